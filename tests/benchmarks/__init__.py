"""Speed and memory beside Hugging Face transformers + PEFT, on the same work: `python -m tests.benchmarks --help`."""
