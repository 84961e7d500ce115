"""Distil a large multimodal model's scientific reasoning into a small language model."""

__version__ = "0.1.0"
