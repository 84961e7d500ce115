"""The families of students that see, behind one face: all but what computes, so that it needs no JAX.

Each has a module of functions with the same names:

    from_hf(raw, processor, where)                    what Hugging Face's files say of pictures; `to_hf`, `processor_to_hf`
    NAMES, WORDS                                      of tensors in files, and of tokens that a tokenizer must have
    with_max_image_tokens(vision, features)                    the same, with so many features of a picture at most
    leaves(vision)                                    the parameters of tower and connector
    picture(vision, image)                            a picture, in RGB, in pieces as the tower reads them
    prompt_ids(vision, rows, columns, tokenizer)      what shows it in a prompt
    row_arrays(vision, pieces, sizes, room)           the pieces of a row of a batch
    places(vision, rows, columns)                     of its features, where positions depend on them
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
    """The module of a student's family."""
    return {PaliGemmaVision: paligemma, SmolVLMVision: smolvlm, Qwen2VLVision: qwen2_vl}[type(vision)]
