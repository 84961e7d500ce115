"""Tiny vision-language models as transformers reads them and as ours, with the same random weights; and images for them."""

from __future__ import annotations

import functools
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from PIL import Image

from sqa_jax.checkpoints.load import Student, load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.data.image import ImageFile
from sqa_jax.data.images import ImageStore, load_images
from sqa_jax.data.problem import Problem
from sqa_jax.models.vision.registry import FAMILIES
from tests.support.torch_models import torch_model, write_checkpoint

if TYPE_CHECKING:
    import torch

_TEXT = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "vocab_size": 304, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
}  # fmt: skip


def _paligemma(kind: str, **options) -> transformers.PretrainedConfig:
    return transformers.PaliGemmaConfig(
        text_config={"model_type": kind, **_TEXT, **options},
        vision_config={"model_type": "siglip_vision_model", **_SIGLIP, "image_size": 42, "vision_use_head": False},
        projection_dim=48, hidden_size=48, image_token_index=260,
    )  # fmt: skip


def _smolvlm() -> transformers.PretrainedConfig:
    return transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **_TEXT}, vision_config={**_SIGLIP, "image_size": 56}, image_token_id=260,
        scale_factor=2, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen2_vl() -> transformers.PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    return transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 48, "mlp_ratio": 2},
        image_token_id=260, vision_start_token_id=261, vision_end_token_id=262, video_token_id=263,
    )  # fmt: skip


CONFIGS = {
    "paligemma": functools.partial(_paligemma, "gemma"),
    "paligemma2": functools.partial(_paligemma, "gemma2", query_pre_attn_scalar=12, sliding_window=16),
    "smolvlm": _smolvlm,
    "qwen2_vl": _qwen2_vl,
}


class VisionPair:
    """A checkpoint of a tiny model, ours of it, and transformers' in PyTorch, which is loaded where it is asked for."""

    def __init__(self, family: str, directory: Path):
        config = CONFIGS[family]()
        self.family, self.path = family, write_checkpoint(directory / family, config)
        vision = FAMILIES[config.model_type].from_hf(config.to_dict(), {}, "tiny")
        byte_tokenizer(vision).save_pretrained(self.path)
        self.student: Student = load_student(str(self.path))

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        return torch_model(self.path)

    def images(self, cache: Path, *sizes: tuple[int, int]) -> ImageStore:
        """Random images of these widths and heights, of questions "0", "1", …"""
        config = self.student.config
        return load_images(
            cache, config.vision, config.vocab_size, [problem(str(k), png(k, size)) for k, size in enumerate(sizes)]
        )

    def model_inputs(self, ids: list[int], images: ImageStore, prompt: int) -> dict[str, torch.Tensor]:
        """Arguments of the PyTorch model for ids as we have them, of which the first `prompt` are a prompt."""
        import torch

        return {name: torch.tensor(array) for name, array in self._arrays(ids, images, prompt).items()}

    def _arrays(self, ids: list[int], images: ImageStore, prompt: int) -> dict[str, np.ndarray]:
        vision: Any = self.student.config.vision
        _, numbers = images.renumber_by_row(np.asarray(ids))
        # As they come in the text.
        features = [token - images.vocab_size for token in ids if token >= images.vocab_size]
        order = list(dict.fromkeys(np.searchsorted(images.feature_offsets, features, side="right") - 1))
        assert sorted(order) == numbers
        tokens = np.array([[vision.image_token if token >= images.vocab_size else token for token in ids]])
        arrays = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        if self.family.startswith("paligemma"):
            arrays["token_type_ids"] = (np.arange(len(ids)) >= prompt).astype(int)[None]
        if self.family == "qwen2_vl":
            arrays["mm_token_type_ids"] = (tokens == vision.image_token).astype(int)
        if not order:
            return arrays
        pieces = [np.asarray(images.pieces_of(number), np.float32) for number in order]
        if self.family == "qwen2_vl":
            mean, std = (np.float32(x)[:, None, None] for x in (vision.pixels.mean, vision.pixels.std))
            normalized = [(blocks.reshape(-1, 3, 1, 196) / 255 - mean) / std for blocks in pieces]
            patches = np.concatenate([np.repeat(blocks, 2, axis=2).reshape(len(blocks), -1) for blocks in normalized])
            grid = np.array([[1, *images.sizes[number][1:]] for number in order])
            return {**arrays, "pixel_values": patches.astype(np.float32), "image_grid_thw": grid}
        tiles = (np.concatenate(pieces) / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32)
        return {**arrays, "pixel_values": tiles[None] if self.family == "smolvlm" else tiles}

    def logits(
        self, ids: list[int], images: ImageStore, prompt: int, model: Any = None, **inputs: torch.Tensor
    ) -> np.ndarray:
        """PyTorch's logits [T, V] of `model`, the bare one by default; `inputs` are added to its arguments."""
        import torch

        with torch.no_grad():
            arguments = {**self.model_inputs(ids, images, prompt), **inputs}
            return (self.model if model is None else model)(**arguments).logits[0].numpy()


def random_array(name: str, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """Normally distributed float32 numbers: for a name always the same, in both libraries."""
    return np.random.default_rng([1, zlib.crc32(name.encode())]).normal(0, spread, shape).astype(np.float32)


def as_bytes(text: str) -> np.ndarray:
    """A text as an array, as references are kept."""
    return np.frombuffer(text.encode(), np.uint8)


def as_text(array: np.ndarray) -> str:
    return array.tobytes().decode()


def png(seed: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


def problem(pid: str, content: bytes | None) -> Problem:
    image = None if content is None else ImageFile(f"image {pid}", lambda: content)
    return Problem(pid, "What is it?", ("a", "b"), 0, image=image)
