"""The quickstart: SmolLM2-135M learns the embedded sample's questions on two CPU cores in minutes."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.student.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.data.train_limit = 1000
    config.recipe.chat = False  # the template's system prompt would be a third of these short prompts
    config.recipe.answer = "both"  # "(B) the option's text": small models score letters alone at chance
    config.train.row_length = 256
    config.train.batch_rows = 4
    config.train.eval_every = 30
    config.eval.row_length = 256
    config.eval.batch_rows = 8
    config.eval.limit = 300
    config.optimizer.learning_rate = 1e-3
    return config
