"""Adapters as parameter trees of their own: LoRA, prefix tuning, prompt tuning, and the whole model."""
