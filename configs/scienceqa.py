"""ScienceQA in its original directory layout: --config.data.path names it. Rows and steps are sized for a CPU."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.data.source = "dir"
    config.student.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.recipe.chat = False
    config.recipe.answer = "text"
    config.train.row_length = 512
    config.train.batch_rows = 2
    config.eval.row_length = 512
    config.optimizer.learning_rate = 2e-3
    return config
