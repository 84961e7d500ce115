"""A tiny vision-language model learns from scratch, on two CPU cores in minutes: the embedded questions about images.

Its blind twin: --config.data.images=drop. The shifted variant: --config.data.source=image-questions-shifted.
"""

from sqa_jax.config import default


def get_config():
    config = default()
    config.data.source = "image-questions"
    config.student.path = "random:paligemma-small"
    config.student.remat = "none"
    config.recipe.format = "QM-A"
    config.recipe.answer = "text"
    config.adapter.methods = ("full",)
    config.optimizer.learning_rate = 3e-3
    config.train.row_length = 288  # two questions with their images
    config.train.batch_rows = 8
    config.train.epochs = 6.0
    config.train.eval_every = 400
    config.train.save_every = 400
    config.eval.row_length = 288
    config.eval.batch_rows = 16
    config.eval.checkpoint = "last"
    return config
