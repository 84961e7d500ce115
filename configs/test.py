"""A tiny random student that runs anywhere in seconds: to try the verbs, and for the tests."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.student.path = "random:tiny"
    config.recipe.max_prompt = 700
    config.train.row_length = 1024
    config.train.batch_rows = 2
    return config
