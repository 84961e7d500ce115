"""ScienceQA from its own directory layout: --config.data.path names it."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.data.source = "dir"
    config.student.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    return config
