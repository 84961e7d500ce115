"""A small student with tools (hypothesis H1), on the embedded sample; with --config.data.source=dir on ScienceQA itself."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.student.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.recipe.chat = False  # plain lines instead of chat turns: a student this small answers better
    config.recipe.answer = "text"
    config.recipe.max_prompt = 320
    config.train.row_length = 640
    config.train.batch_rows = 2
    config.eval.limit = 300
    config.optimizer.learning_rate = 2e-3
    return config
