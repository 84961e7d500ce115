"""Pictures of Qwen2-VL (Wang et al. 2024, arXiv:2409.12191).

A picture keeps its proportions: it becomes as many patches as its size asks for, and each square of merge × merge
patches becomes one feature. Features take the places of the prompt's image tokens, behind nothing else: this decoder
does not scale embeddings. Where they stand, for the decoder's rotary embedding, is a place in three dimensions.
"""

from sqa_jax.models.vision.qwen2_vl.config import (
    NAMES,
    WORDS,
    Qwen2VLVision,
    from_hf,
    param_specs,
    processor_to_hf,
    to_hf,
    with_max_image_tokens,
)
from sqa_jax.models.vision.qwen2_vl.preprocess import picture, places, prompt_ids, row_arrays

__all__ = [
    "NAMES", "WORDS", "Qwen2VLVision", "from_hf", "param_specs", "picture", "places", "processor_to_hf",
    "prompt_ids", "row_arrays", "to_hf", "with_max_image_tokens",
]  # fmt: skip
