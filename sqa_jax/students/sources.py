"""Weights in files, one tensor at a time: safetensors (single or sharded) and GGUF.

A source has `where` (for messages), `shapes` {Hugging Face's name: shape} and `read(name)`. Opening one
checks that its files are whole; reading never changes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sqa_jax.errors import UserError
from sqa_jax.files import read_json


class WeightSource(Protocol):
    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's orientation; float16 and bfloat16 stay what they are."""
        ...


class SafetensorsSource:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
      UserError: no weights, a missing shard, or a file that is cut off.
    """

    def __init__(self, directory: str | Path):
        from safetensors import SafetensorError, safe_open

        directory = Path(directory)
        self.where = str(directory)
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.exists():
            listed = read_json(index, "the list of weight shards").get("weight_map", {})
            files = sorted(set(listed.values()))
        elif single.exists():
            listed, files = {}, [single.name]
        else:
            raise UserError(f"{directory}: has no model.safetensors and no model.safetensors.index.json; fetch the weights in safetensors format")
        self._handles, self._file_of, self.shapes = {}, {}, {}
        for file in files:
            path = directory / file
            if not path.exists():
                raise UserError(f"{path}: shard not found, but {index.name} lists it; fetch it again")
            try:
                handle = self._handles[file] = safe_open(path, framework="numpy")
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: damaged or cut off ({error}); fetch the file again") from None
            for name in names:
                self._file_of[name] = file
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
        absent = sorted(name for name, file in listed.items() if self._file_of.get(name) != file)
        if absent:
            raise UserError(f"{directory / listed[absent[0]]}: tensor {absent[0]} is missing, but {index.name} lists it; fetch the shard again")

    def read(self, name: str) -> np.ndarray:
        return self._handles[self._file_of[name]].get_tensor(name)


# llama.cpp's names of tensors → Hugging Face's.
_GGUF_NAMES = (
    (r"token_embd\.weight", "model.embed_tokens.weight"),
    (r"output_norm\.weight", "model.norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blk\.(\d+)\.attn_output\.(weight|bias)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)", r"model.layers.\1.mlp.\2_proj.\3"),
)


class GGUFSource:
    """A GGUF file of the llama architecture, whatever its quantization.

    Attributes:
      metadata: the file's keys and values.

    Raises:
      UserError: not a GGUF file, or cut off.
    """

    def __init__(self, path: str | Path):
        import gguf

        self.where = str(path)
        if not Path(path).exists():
            raise UserError(f"{path}: not found; `bash launch/quickstart.sh` fetches the quickstart's student")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise UserError(f"{path}: not a GGUF file, damaged or cut off ({error}); fetch it again") from None
        self._tensors, self.shapes = {}, {}
        for tensor in reader.tensors:
            if tensor.data.size * tensor.data.itemsize != tensor.n_bytes:
                raise UserError(f"{path}: tensor {tensor.name} is cut off; fetch the file again")
            name = _hugging_face_name(tensor.name)
            self._tensors[name] = tensor
            self.shapes[name] = tuple(int(n) for n in reversed(tensor.shape))

    def read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        except NotImplementedError:
            raise UserError(f"{self.where}: tensor {name} has quantization {tensor.tensor_type.name}, which the gguf package cannot read") from None
        if match := re.search(r"self_attn\.([qk])_proj", name):
            key = "head_count" if match[1] == "q" else "head_count_kv"
            values = _unpermute(values, self.metadata[f"llama.attention.{key}"])
        return values


def _hugging_face_name(name: str) -> str:
    for pattern, replacement in _GGUF_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name  # unknown: the check against the layout refuses it by name


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores each head's rotary pairs interleaved (x0 x₁ …); the decoder has them half by half."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face directory. Raises `UserError` where it is missing or damaged."""
    raw = read_json(Path(directory) / "config.json", "the model's architecture")
    if not isinstance(raw, dict):
        raise UserError(f"{directory}/config.json: not a JSON object; fetch it again")
    return raw
