"""The language models that learn: modules, weights in and out, tokenizers."""
