"""Checkpoints: finding, reading and writing pretrained students and their tokenizers.

Public face: `load.load_student` and `load.student_config` (from a Hugging Face directory, a hub id, a GGUF file, or
"random:…"), `tokenizer.load_tokenizer` and `tokenizer.byte_tokenizer`, and `weights` (read, initialise and write a
parameter tree). `sources.WeightSource` is the interface of the file formats: `safetensors_source`, and the package `gguf`.
"""
