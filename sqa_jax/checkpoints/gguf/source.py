"""Weights in a GGUF file, whatever its quantization."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

from sqa_jax.checkpoints.gguf.header import TensorInfo, read_header
from sqa_jax.errors import UserError

_LINEARS = {
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
    "blk.{}.attn_q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
} | {
    f"blk.{{}}.{gguf_name}.{part}": f"model.layers.{{}}.{hf_name}.{part}"
    for gguf_name, hf_name in _LINEARS.items()
    for part in ("weight", "bias")
}
# Gemma 2 and 3 also have norms after attention and MLP (sandwich norms); one name then means another norm.
_SANDWICH_NAMES = _NAMES | {
    "blk.{}.post_attention_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blk.{}.post_ffw_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}
# What llama.cpp's convert_hf_to_gguf.py changes, by architecture.
_SANDWICH = ("gemma2", "gemma3")
_INTERLEAVED = ("llama", "smollm3")
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")
_ROPE_DIVISORS = "rope_freqs.weight"


class GGUFSource:
    """The weights of a GGUF file, dequantized, in Hugging Face's names and layout; see `WeightSource`.

    Attributes:
      metadata: the file's keys and values.
      rope_divisors: the divisor of each rotary frequency, where the file has them (Llama 3.1 and later); else None.

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
        _check_quantization(tensors, self.where)
        self._architecture = self.metadata.get("general.architecture")
        self._names = _SANDWICH_NAMES if self._architecture in _SANDWICH else _NAMES
        self._tensors: dict[str, TensorInfo] = {_rename(tensor.name, self._names): tensor for tensor in tensors}
        self.rope_divisors = self.read(_ROPE_DIVISORS) if _ROPE_DIVISORS in self._tensors else None
        self._tensors.pop(_ROPE_DIVISORS, None)  # part of the configuration, not a weight
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        buffer = np.frombuffer(self._data, np.uint8, tensor.size, tensor.offset)
        count = tensor.shape[0]
        order, data = self._order(name, count), buffer.reshape(count, -1) if len(tensor.shape) > 1 else buffer
        if len(tensor.shape) == 1:  # a block can span several values
            values = gguf.dequantize(data, tensor.kind)
            if self._architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight"):
                values = values - 1
            return values[rows] if order is None else values[order[rows]]
        picked = data[rows] if order is None else data[order[rows]]
        return gguf.dequantize(picked, tensor.kind).reshape(-1, *tensor.shape[1:])

    def locate(self, name: str) -> str:
        if name in self._tensors:
            return f"{self.where}: tensor {self._tensors[name].name}"
        return (
            f"{self.where}: tensor {_rename(name, {hf_name: gguf_name for gguf_name, hf_name in self._names.items()})}"
        )

    def _order(self, name: str, count: int) -> np.ndarray | None:
        """The file's index of each row; None where the orders agree.

        llama.cpp stores a Llama's rows of q and k with each head's rotary pairs interleaved (x₀ x₀′ x₁ x₁′ …);
        Hugging Face's order, and the decoder's, is all first halves, then all second halves (x₀ x₁ … x₀′ x₁′ …).
        """
        match = re.search(r"self_attn\.([qk])_proj", name)
        if match is None or self._architecture not in _INTERLEAVED:
            return None
        heads: Any = self.metadata.get(f"{self._architecture}.attention.head_count")
        if match[1] == "k":
            heads = self.metadata.get(f"{self._architecture}.attention.head_count_kv", heads)
        return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(count)


def _rename(name: str, table: dict[str, str]) -> str:
    """The name in the other scheme; an unknown name stays, and `check_source` refuses it."""
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return table.get(name, name)
    template = f"{name[: layer.start()]}.{{}}.{name[layer.end() :]}"
    return table[template].format(layer[1]) if template in table else name


def _check_quantization(tensors: list[TensorInfo], where: str) -> None:
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
