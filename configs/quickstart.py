"""The quickstart: SmolLM2-135M learns the embedded sample's questions on two CPU cores in minutes."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.student.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    return config
