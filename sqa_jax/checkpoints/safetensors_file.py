"""Opening one safetensors file, with a clear message on what is wrong with it, and writing one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sqa_jax.errors import UserError

_DTYPES = ("F64", "F32", "F16", "BF16")


def open_safetensors(path: str | Path) -> Any:
    """An open file, as `safetensors.safe_open` returns it, every tensor of which can be read.

    Raises:
      UserError: it is missing, cut off or damaged, or a tensor has a dtype that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: not found; fetch it again")
    try:
        handle = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {_damage(path) or error}; fetch the file again") from None
    for name in handle.keys():
        if (kind := handle.get_slice(name).get_dtype()) not in _DTYPES:
            raise UserError(
                f"{path}: tensor {name} is stored as {kind}; supported: {', '.join(_DTYPES)}; use the original weights"
            )
    return handle


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file that PyTorch's libraries accept as theirs.

    Raises:
      UserError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error}); free some space or choose another place") from None
    Path(path).chmod(0o644)  # the library makes it private; it should be as readable as the files beside it


def _damage(path: Path) -> str | None:
    """What is wrong with a file that safetensors refuses, in terms of its tensors; None where that cannot be said."""
    if path.is_dir():
        return "is a directory"
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            return f"cut off inside its header ({size:,} bytes), or not a safetensors file"
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "its header is damaged"
    beyond = min((name for name, end in ends.items() if end > size), key=ends.__getitem__, default=None)
    if beyond is not None:
        return f"cut off: tensor {beyond} ends at byte {ends[beyond]:,}, the file at {size:,}"
    return None
