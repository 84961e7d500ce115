"""The families of vision-language models behind one face: all but the computation, so that it needs no JAX.

Each is a module with the same functions and constants:

    from_hf(raw, processor, where)                    the vision configuration of Hugging Face's files
    to_hf(vision), processor_to_hf(vision)            the same files' contents
    TENSOR_NAMES, SPECIAL_TOKENS                      of tensors in files, and that a tokenizer must have
    with_max_image_tokens(vision, count)              the configuration with at most so many features of an image
    param_specs(vision)                               the parameters of vision encoder and connector
    preprocess_image(vision, image)                   an RGB image in pieces, as the encoder takes them
    prompt_ids(vision, rows, columns, tokenizer)      the tokens of an image in a prompt
    encoder_inputs(vision, pieces, grids, capacity)   the encoder's input for a packed row
    mrope_offsets(vision, rows, columns)              of its features, where positions depend on them (M-RoPE)
"""

from __future__ import annotations

from types import ModuleType

from sqa_jax.models.vision import paligemma, qwen2_vl, smolvlm
from sqa_jax.models.vision.image_input import PreprocessedImage
from sqa_jax.models.vision.paligemma import PaliGemmaVision
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision
from sqa_jax.models.vision.smolvlm import SmolVLMVision

__all__ = ["FAMILIES", "PreprocessedImage", "VisionConfig", "vision_family"]

VisionConfig = PaliGemmaVision | SmolVLMVision | Qwen2VLVision
FAMILIES: dict[str, ModuleType] = {  # values of model_type
    "paligemma": paligemma,
    "smolvlm": smolvlm,
    "idefics3": smolvlm,
    "qwen2_vl": qwen2_vl,
}


def vision_family(vision: VisionConfig) -> ModuleType:
    """The module of a model's family."""
    return {PaliGemmaVision: paligemma, SmolVLMVision: smolvlm, Qwen2VLVision: qwen2_vl}[type(vision)]
