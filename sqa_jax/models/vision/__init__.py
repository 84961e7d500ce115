"""Vision encoders and connectors of vision-language models: from images to features in place of text embeddings.

Families (PaliGemma, SmolVLM and Idefics 3, Qwen2-VL) share one face. `registry` holds what needs no JAX: configuration,
parameter table, image preprocessing, the image's tokens in a prompt. `encode.encode_images` computes the features,
with what `adapter.VisionAdapter` adds.
"""
