"""Tiny students that see, in transformers and here, with the same random weights; and pictures for them."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from sqa_jax.checkpoints.load import Student, load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.data.images import ImageStore, load_pictures
from sqa_jax.data.problem import ImageFile, Problem
from sqa_jax.models.vision.registry import FAMILIES

VOCABULARY = 304  # rows of the embedding tables: bytes, and the tokens that show pictures
_TEXT = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}


def _paligemma(kind: str, **own):
    text = {"model_type": kind, **_TEXT, **own}
    tower = {"model_type": "siglip_vision_model", **_TOWER, "image_size": 42, "vision_use_head": False}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=tower, projection_dim=48, hidden_size=48, image_token_index=260
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _smolvlm():
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **_TEXT}, vision_config={**_TOWER, "image_size": 56}, image_token_id=260,
        scale_factor=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config)


def _qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    tower = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 48, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope}, vision_config=tower, image_token_id=260, vision_start_token_id=261,
        video_token_id=263,
        vision_end_token_id=262,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


MODELS = {
    "paligemma": functools.partial(_paligemma, "gemma"),
    "paligemma2": functools.partial(_paligemma, "gemma2", query_pre_attn_scalar=12, sliding_window=16),
    "smolvlm": _smolvlm,
    "qwen2_vl": _qwen2_vl,
}


class VisionPair:
    """A tiny model in PyTorch, and ours of the files that it saved."""

    def __init__(self, family: str, directory: Path):
        torch.manual_seed(0)
        self.family, self.model = family, MODELS[family]().eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                # Far from their start, so that a wrong norm, bias or scale is seen; but embeddings, which are the output
                # layer, too, stay small, or greedy texts repeat one token.
                parameter += (0.01 if "embed_tokens" in name else 0.2) * torch.randn_like(parameter)
        self.path = directory / family
        self.model.save_pretrained(self.path)
        module = FAMILIES[self.model.config.model_type]
        words = byte_tokenizer(module.from_hf(self.model.config.to_dict(), {}, "tiny"))
        words.save_pretrained(self.path)
        self.student: Student = load_student(str(self.path))

    def pictures(self, cache: Path, *sizes: tuple[int, int]) -> ImageStore:
        """Random pictures of these widths and heights, of questions "0", "1", …"""
        config = self.student.config
        return load_pictures(
            cache, config.vision, config.vocab_size, [problem(str(k), png(k, size)) for k, size in enumerate(sizes)]
        )

    def theirs(self, ids: list[int], pictures: ImageStore, prompt: int) -> dict[str, torch.Tensor]:
        """Arguments of the PyTorch model for ids as we have them, of which the first `prompt` are a prompt."""
        vision = self.student.config.vision
        _, numbers = pictures.by_row(np.asarray(ids))
        # As they come in the text.
        features = [token - pictures.vocabulary for token in ids if token >= pictures.vocabulary]
        order = list(dict.fromkeys(np.searchsorted(pictures.firsts, features, side="right") - 1))
        assert sorted(order) == numbers
        tokens = torch.tensor([[vision.image_token if token >= pictures.vocabulary else token for token in ids]])
        made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.family.startswith("paligemma"):
            made["token_type_ids"] = (torch.arange(len(ids)) >= prompt).long()[None]
        if self.family == "qwen2_vl":
            made["mm_token_type_ids"] = (tokens == vision.image_token).long()
        if not order:
            return made
        pieces = [np.asarray(pictures.pieces_of(number), np.float32) for number in order]
        if self.family == "qwen2_vl":
            mean, std = (np.float32(x)[:, None, None] for x in (vision.pixels.mean, vision.pixels.std))
            shown = [(own.reshape(-1, 3, 1, 196) / 255 - mean) / std for own in pieces]
            patches = np.concatenate([np.repeat(own, 2, axis=2).reshape(len(own), -1) for own in shown])
            grid = [[1, *pictures.sizes[number][1:]] for number in order]
            return {**made, "pixel_values": torch.tensor(patches), "image_grid_thw": torch.tensor(np.asarray(grid))}
        tiles = torch.tensor(np.concatenate(pieces) / 127.5 - 1).permute(0, 3, 1, 2)
        return {**made, "pixel_values": tiles[None] if self.family == "smolvlm" else tiles}


def png(seed: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


def problem(pid: str, content: bytes | None) -> Problem:
    image = None if content is None else ImageFile(f"picture {pid}", lambda: content)
    return Problem(pid, "What is it?", ("a", "b"), 0, image=image)
