"""The quickstart: SmolLM2-135M learns the embedded sample's questions on two CPU cores in minutes."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.student.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.recipe.chat = False  # the chat template's system prompt would be a third of these short prompts
    config.recipe.answer = "text"  # a student this small cannot bind letters to options, but can write an option
    config.train.row_length = 256
    config.train.batch_rows = 2  # about eight questions per step: many small steps learn more than few large ones
    config.train.eval_every = 50
    config.eval.row_length = 256
    config.eval.batch_rows = 8
    config.eval.limit = 300
    config.optimizer.learning_rate = 2e-3
    return config
