"""Building blocks of the models: attention and its kernels, masks, rotary embeddings, KV cache, linear layers with LoRA."""
