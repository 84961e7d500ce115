"""The header of a GGUF file: its metadata (keys and values), and the offset of each tensor.

The `gguf` package decodes the tensors, but its reader spends seconds on a vocabulary (one array object a token)
and cannot say which tensor a truncated file lacks. The format is specified in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from sqa_jax.errors import UserError

_VERSIONS = (2, 3)
# GGUF's value types.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """A tensor's place in the file.

    Attributes:
      name: llama.cpp's.
      shape: outermost first, as in NumPy.
      kind: a `gguf.GGMLQuantizationType`.
      offset: of its first byte in the file.
      size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    offset: int
    size: int


def read_header(data: bytes | memoryview, where: str) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Reads the header of a whole file.

    Args:
      data: the file's bytes.
      where: the file, for messages.

    Returns:
      Its metadata, and its tensors, each of which is within `data`.

    Raises:
      UserError: not a GGUF file, cut off (the first incomplete tensor is named), or damaged.
    """
    if bytes(data[:4]) != b"GGUF":
        raise UserError(f"{where}: not a GGUF file (it does not begin with GGUF); fetch it again")
    cursor = _Cursor(data)
    try:
        version = cursor.scalar("<u4", at=4)
        if version not in _VERSIONS:
            supported = ", ".join(map(str, _VERSIONS))
            raise UserError(f"{where}: GGUF version {version} is not supported; supported: {supported}")
        tensor_count, key_count = cursor.scalar("<u8"), cursor.scalar("<u8")
        metadata = {}
        for _ in range(key_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("<u4"))
        entries = []
        for _ in range(tensor_count):
            name, dimensions = cursor.string(), cursor.scalar("<u4")
            shape = cursor.array("<u8", dimensions)[::-1]
            entries.append((name, tuple(shape), cursor.scalar("<u4"), cursor.scalar("<u8")))
    except _OutOfBytes:
        raise UserError(f"{where}: cut off inside its header ({len(data):,} bytes); fetch it again") from None
    except KeyError as error:
        raise UserError(f"{where}: its header is damaged (unknown type of value {error}); fetch it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: its header is damaged (a text is not UTF-8); fetch it again") from None
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{where}: general.alignment is {alignment!r}, not a number of bytes; fetch it again")
    start = -(-cursor.position // alignment) * alignment
    tensors = [_tensor(entry, start, len(data), where) for entry in entries]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise UserError(f"{where}: holds two tensors of the same name; fetch it again")
    return metadata, tensors


def _tensor(entry: tuple[str, tuple[int, ...], int, int], start: int, length: int, where: str) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, number, offset = entry
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UserError(
            f"{where}: tensor {name} has the unknown type {number}; upgrade the gguf package or use another file"
        ) from None
    if not shape or shape[-1] % block:
        raise UserError(f"{where}: tensor {name} {shape} does not consist of whole blocks of {block}; fetch it again")
    size = math.prod(shape) // block * block_bytes
    end = start + offset + size
    if end > length:
        raise UserError(f"{where}: cut off: tensor {name} ends at byte {end:,}, the file at {length:,}; fetch it again")
    return TensorInfo(name, shape, kind, start + offset, size)


class _OutOfBytes(Exception):
    pass


class _Cursor:
    """Reads values sequentially and never past the end."""

    def __init__(self, data: bytes | memoryview):
        self._data = data
        self.position = 0

    def _take(self, count: int) -> int:
        """Moves past `count` bytes and returns their offset."""
        begin, self.position = self.position, self.position + count
        if self.position > len(self._data):
            raise _OutOfBytes
        return begin

    def scalar(self, dtype: str, at: int | None = None) -> Any:
        if at is not None:
            self.position = at
        return self.array(dtype, 1)[0]

    def array(self, dtype: str, count: int) -> list[Any]:
        begin = self._take(np.dtype(dtype).itemsize * count)
        if not count:  # NumPy refuses an empty buffer at the end of the file
            return []
        return np.frombuffer(self._data, dtype, count, begin).tolist()

    def string(self) -> str:
        begin = self._take(8)
        (length,) = struct.unpack_from("<Q", self._data, begin)
        begin = self._take(length)
        return str(self._data[begin : begin + length], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("<u4"), self.scalar("<u8")
        if kind in _SCALARS:
            return self.array(_SCALARS[kind], count)
        return [self.value(kind) for _ in range(count)]
