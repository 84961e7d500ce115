"""Image input of Qwen2-VL (Wang et al. 2024, arXiv:2409.12191).

An image keeps its aspect ratio (naive dynamic resolution): it has as many patches as its size asks for, and each square
of merge × merge patches becomes one feature. Features replace the embeddings of the prompt's image tokens; this decoder
does not scale embeddings. Their positions for the decoder's rotary embedding have three components (M-RoPE).
"""

from sqa_jax.models.vision.qwen2_vl.config import (
    SPECIAL_TOKENS,
    TENSOR_NAMES,
    Qwen2VLVision,
    from_hf,
    param_specs,
    processor_to_hf,
    to_hf,
    with_max_image_tokens,
)
from sqa_jax.models.vision.qwen2_vl.preprocess import encoder_inputs, mrope_offsets, preprocess_image, prompt_ids

__all__ = [
    "SPECIAL_TOKENS", "TENSOR_NAMES", "Qwen2VLVision", "encoder_inputs", "from_hf", "mrope_offsets", "param_specs",
    "preprocess_image", "processor_to_hf", "prompt_ids", "to_hf", "with_max_image_tokens",
]  # fmt: skip
