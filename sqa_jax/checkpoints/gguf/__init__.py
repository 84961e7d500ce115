"""llama.cpp's GGUF files: `header` (the binary format), `source` (weights), `config` and `tokenizer`."""
