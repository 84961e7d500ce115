"""Published students by short names: their hub ids, and their shapes, to plan with before downloading.

The shapes are those of the models' own `config.json`; `random:NAME` is a student of that shape with random weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from sqa_jax.models.decoder_config import FULL, NOPE, WINDOW, DecoderConfig
from sqa_jax.models.rope_frequencies import Rope
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.vision.paligemma import PaliGemmaVision
from sqa_jax.models.vision.pixels import PixelTransform
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision
from sqa_jax.models.vision.registry import VisionConfig
from sqa_jax.models.vision.siglip_config import SiglipConfig
from sqa_jax.models.vision.smolvlm import SmolVLMVision


class Published(NamedTuple):
    """A published student.

    Attributes:
      hub: its id on the hub.
      config: its shape and options.
    """

    hub: str
    config: StudentConfig


def _smollm2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, theta: float) -> DecoderConfig:
    return DecoderConfig(
        49152, hidden, inner, layers, heads, kv_heads, 64, Rope(theta), tie_embeddings=True, max_positions=8192
    )


def _llama3(hidden: int, inner: int, layers: int, heads: int, width: int, factor: float, tied: bool) -> DecoderConfig:
    rope = Rope(5e5, "llama3", factor)
    return DecoderConfig(
        128256, hidden, inner, layers, heads, 8, width, rope, tie_embeddings=tied, max_positions=131072
    )


def _qwen2(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, width: int, tied: bool):
    return DecoderConfig(
        vocabulary, hidden, inner, layers, heads, kv_heads, width, Rope(1e6), 1e-6, tied, qkv_bias=True,
        max_positions=32768, family="qwen2",
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        151936, hidden, inner, layers, heads, 8, 128, Rope(1e6), 1e-6, tied, max_positions=40960, family="qwen3",
        qk_norm=True,
    )  # fmt: skip


def _tiny_gemma(inner: int) -> DecoderConfig:
    return DecoderConfig(
        260, 64, inner, 2, 4, 2, 16, tie_embeddings=True, family="gemma", activation="gelu_tanh", norm_offset=True,
        embedding_scale=True,
    )  # fmt: skip


def _gemma2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        256000, hidden, inner, layers, heads, kv_heads, 256, norm_epsilon=1e-6, tie_embeddings=True, max_positions=8192,
        family="gemma2", activation="gelu_tanh", norm_offset=True, sandwich_norms=True, embedding_scale=True,
        query_scale=256, attention_softcap=50.0, logit_softcap=30.0, window=4096,
        layer_types=tuple(FULL if i % 2 else WINDOW for i in range(layers)),
    )  # fmt: skip


def _gemma3(hidden: int, inner: int, layers: int) -> DecoderConfig:
    return DecoderConfig(
        262144, hidden, inner, layers, 4, 1, 256, Rope(1e6), 1e-6, True, max_positions=32768, family="gemma3_text",
        activation="gelu_tanh", qk_norm=True, norm_offset=True, sandwich_norms=True, embedding_scale=True,
        query_scale=256, window=512, layer_types=tuple(WINDOW if (i + 1) % 6 else FULL for i in range(layers)),
        local_rope=Rope(1e4),
    )  # fmt: skip


_SO400M = SiglipConfig(1152, 4304, 27, 16, 224, 14)
_BICUBIC, _LANCZOS = PixelTransform(3), PixelTransform(1)


def _with_vision(text: DecoderConfig, vision: VisionConfig, **options: Any) -> DecoderConfig:
    return dataclasses.replace(text, vision=vision, **options)


def _paligemma(
    text: DecoderConfig, encoder: SiglipConfig = _SO400M, image_token: int = 257152, vocabulary: int = 257216
) -> DecoderConfig:
    vision = PaliGemmaVision(encoder, text.hidden_size, image_token, _BICUBIC)
    return _with_vision(text, vision, vocab_size=vocabulary, prefix_lm=True, first_position=1)


def _smolvlm(text: DecoderConfig) -> DecoderConfig:
    vision = SmolVLMVision(
        SiglipConfig(768, 3072, 12, 12, 512, 16), text.hidden_size, 49190, _LANCZOS, 4, 2048, family="idefics3"
    )
    return _with_vision(text, vision, vocab_size=49280, tie_embeddings=False)


CATALOGUE: dict[str, Published] = {
    "smollm2-135m": Published("HuggingFaceTB/SmolLM2-135M-Instruct", _smollm2(576, 1536, 30, 9, 3, 1e5)),
    "smollm2-360m": Published("HuggingFaceTB/SmolLM2-360M-Instruct", _smollm2(960, 2560, 32, 15, 5, 1e5)),
    "smollm2-1.7b": Published("HuggingFaceTB/SmolLM2-1.7B-Instruct", _smollm2(2048, 8192, 24, 32, 32, 1.3e5)),
    "smollm3-3b": Published(
        "HuggingFaceTB/SmolLM3-3B",
        DecoderConfig(
            128256, 2048, 11008, 36, 16, 4, 128, Rope(5e6), 1e-6, True, max_positions=65536, family="smollm3",
            layer_types=tuple(FULL if (i + 1) % 4 else NOPE for i in range(36)),
        ),
    ),
    "llama-3-8b": Published(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, Rope(5e5), max_positions=8192),
    ),
    "llama-3.2-1b": Published("meta-llama/Llama-3.2-1B-Instruct", _llama3(2048, 8192, 16, 32, 64, 32.0, True)),
    "llama-3.2-3b": Published("meta-llama/Llama-3.2-3B-Instruct", _llama3(3072, 8192, 28, 24, 128, 32.0, True)),
    "llama-3.1-8b": Published("meta-llama/Llama-3.1-8B-Instruct", _llama3(4096, 14336, 32, 32, 128, 8.0, False)),
    "qwen2.5-0.5b": Published("Qwen/Qwen2.5-0.5B-Instruct", _qwen2(151936, 896, 4864, 24, 14, 2, 64, True)),
    "qwen2.5-1.5b": Published("Qwen/Qwen2.5-1.5B-Instruct", _qwen2(151936, 1536, 8960, 28, 12, 2, 128, True)),
    "qwen2.5-3b": Published("Qwen/Qwen2.5-3B-Instruct", _qwen2(151936, 2048, 11008, 36, 16, 2, 128, True)),
    "qwen2.5-7b": Published("Qwen/Qwen2.5-7B-Instruct", _qwen2(152064, 3584, 18944, 28, 28, 4, 128, False)),
    "qwen3-0.6b": Published("Qwen/Qwen3-0.6B", _qwen3(1024, 3072, 28, 16, True)),
    "qwen3-1.7b": Published("Qwen/Qwen3-1.7B", _qwen3(2048, 6144, 28, 16, True)),
    "qwen3-4b": Published("Qwen/Qwen3-4B", _qwen3(2560, 9728, 36, 32, True)),
    "qwen3-8b": Published("Qwen/Qwen3-8B", _qwen3(4096, 12288, 36, 32, False)),
    "gemma2-2b": Published("google/gemma-2-2b-it", _gemma2(2304, 9216, 26, 8, 4)),
    "gemma2-9b": Published("google/gemma-2-9b-it", _gemma2(3584, 14336, 42, 16, 8)),
    "gemma3-270m": Published("google/gemma-3-270m-it", _gemma3(640, 2048, 18)),
    "gemma3-1b": Published("google/gemma-3-1b-it", _gemma3(1152, 6912, 26)),
    "flan-t5-small": Published("google/flan-t5-small", T5Config(32128, 512, 1024, 8, 8, 6, 64)),
    "flan-t5-base": Published("google/flan-t5-base", T5Config(32128, 768, 2048, 12, 12, 12, 64)),
    "flan-t5-large": Published("google/flan-t5-large", T5Config(32128, 1024, 2816, 24, 24, 16, 64)),
    "flan-t5-xl": Published("google/flan-t5-xl", T5Config(32128, 2048, 5120, 24, 24, 32, 64)),
    # Vision-language models.
    "paligemma-3b": Published(
        "google/paligemma-3b-mix-224",
        _paligemma(
            DecoderConfig(
                257216, 2048, 16384, 18, 8, 1, 256, norm_epsilon=1e-6, tie_embeddings=True, max_positions=8192,
                family="gemma", activation="gelu_tanh", norm_offset=True, embedding_scale=True,
            )
        ),
    ),
    "paligemma2-3b": Published("google/paligemma2-3b-mix-224", _paligemma(_gemma2(2304, 9216, 26, 8, 4))),
    "smolvlm-256m": Published("HuggingFaceTB/SmolVLM-256M-Instruct", _smolvlm(_smollm2(576, 1536, 30, 9, 3, 1e5))),
    "smolvlm-500m": Published("HuggingFaceTB/SmolVLM-500M-Instruct", _smolvlm(_smollm2(960, 2560, 32, 15, 5, 1e5))),
    "qwen2-vl-2b": Published(
        "Qwen/Qwen2-VL-2B-Instruct",
        _with_vision(
            _qwen2(151936, 1536, 8960, 28, 12, 2, 128, True), Qwen2VLVision(1536), mrope_sections=(16, 24, 24)
        ),
    ),
}  # fmt: skip

# Shapes for "random:<name>": those that learn nothing of language but run everywhere in seconds, with the tokenizer of
# bytes, and the published ones.
SHAPES: dict[str, StudentConfig] = {
    "tiny": DecoderConfig(260, 64, 128, 2, 4, 2, 16, tie_embeddings=True),
    "small": DecoderConfig(260, 128, 384, 4, 8, 4, 16, tie_embeddings=True),
    "t5-tiny": T5Config(260, 64, 128, 2, 2, 4, 16),
    "t5-small": T5Config(260, 128, 256, 3, 3, 8, 16),
    "paligemma-tiny": _paligemma(_tiny_gemma(128), SiglipConfig(64, 128, 2, 4, 64, 16), 260, 264),
    "paligemma-small": _paligemma(_tiny_gemma(192), SiglipConfig(64, 192, 2, 4, 48, 8), 260, 264),
    "smolvlm-tiny": _with_vision(
        DecoderConfig(304, 64, 128, 2, 4, 2, 16),
        SmolVLMVision(SiglipConfig(64, 128, 2, 4, 64, 16), 64, 260, _LANCZOS, 2, 128),
    ),
    "qwen2-vl-tiny": _with_vision(
        DecoderConfig(264, 64, 128, 2, 4, 2, 16, qkv_bias=True, family="qwen2"),
        Qwen2VLVision(64, 64, 2, 4, 2, image_token=260, vision_start=261, vision_end=262, max_pixels=28 * 28 * 64),
        mrope_sections=(2, 3, 3),
    ),
    **{name: published.config for name, published in CATALOGUE.items()},
}
