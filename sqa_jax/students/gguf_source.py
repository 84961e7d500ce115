"""Weights in a GGUF file, whatever its quantization."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

from sqa_jax.errors import UserError
from sqa_jax.students.gguf_header import TensorInfo, read_header

_LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's names of tensors and Hugging Face's; {} is the layer.
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
} | {
    f"blk.{{}}.{theirs}.{part}": f"model.layers.{{}}.{ours}.{part}"
    for theirs, ours in _LAYERS.items()
    for part in ("weight", "bias")
}
_GGUF_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}


class GGUFSource:
    """The weights of a GGUF file of the llama architecture; see `WeightSource`.

    Attributes:
      metadata: the file's keys and values.

    Raises:
      UserError: not a GGUF file, cut off, one part of several, or a quantization that cannot be decoded.
    """

    def __init__(self, path: str | Path):
        self.where = str(path)
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise UserError(f"{path}: is empty; fetch it again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check config.student.path") from None
        self._data = memoryview(data)
        self.metadata, tensors = read_header(self._data, self.where)
        parts = self.metadata.get("split.count", 1)
        if parts > 1:
            raise UserError(f"{path}: is one of {parts} parts; join them with llama-gguf-split --merge")
        _check_kinds(tensors, self.where)
        self._tensors: dict[str, TensorInfo] = {_rename(tensor.name, _NAMES): tensor for tensor in tensors}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        data = np.frombuffer(self._data, np.uint8, tensor.size, tensor.offset)
        if len(tensor.shape) > 1:
            data = data.reshape(tensor.shape[0], -1)
        order = self._order(name, tensor.shape[0])
        if len(tensor.shape) == 1:  # a block can span several values
            values = gguf.dequantize(data, tensor.kind)
            return values[rows] if order is None else values[order[rows]]
        picked = data[rows] if order is None else data[order[rows]]
        return gguf.dequantize(picked, tensor.kind).reshape(-1, *tensor.shape[1:])

    def locate(self, name: str) -> str:
        theirs = self._tensors[name].name if name in self._tensors else _rename(name, _GGUF_NAMES)
        return f"{self.where}: tensor {theirs}"

    def _order(self, name: str, count: int) -> np.ndarray | None:
        """Of each row, where the file has it; None where it has all in place.

        llama.cpp stores the rows of q and k with each head's rotary pairs side by side (x₀ x₀′ x₁ x₁′ …); Hugging
        Face's order, and the decoder's, is all first halves, then all second halves (x₀ x₁ … x₀′ x₁′ …).
        """
        if not (match := re.search(r"self_attn\.([qk])_proj", name)):
            return None
        heads = self.metadata.get("llama.attention.head_count")
        if match[1] == "k":
            heads = self.metadata.get("llama.attention.head_count_kv", heads)
        return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(count)


def _rename(name: str, table: dict[str, str]) -> str:
    """The name in the other scheme; an unknown one stays, and the check against the layout refuses it."""
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return table.get(name, name)
    template = f"{name[: layer.start()]}.{{}}.{name[layer.end() :]}"
    return table[template].format(layer[1]) if template in table else name


def _check_kinds(tensors: list[TensorInfo], where: str) -> None:
    """Raises `UserError` where the gguf package cannot decode a tensor, before anything is read."""
    import gguf

    first: dict[Any, str] = {}
    for tensor in tensors:
        first.setdefault(tensor.kind, tensor.name)
    for kind, name in first.items():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UserError(
                f"{where}: tensor {name} is stored as {kind.name}, which the gguf package cannot decode; use a file of another quantization"
            ) from None
