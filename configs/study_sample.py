"""The whole study in small, on the embedded sample with its simulated teacher: minutes on two CPU cores.

Too few questions for conclusions: it shows what a study produces, and that it runs on this machine.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    config = quickstart()
    config.data.teacher = ("sample",)
    config.data.train_limit = 120
    config.recipe.format = "QCM-AE"
    config.recipe.max_prompt = 160
    config.recipe.max_target = 96
    config.train.batch_rows = 1
    config.train.eval_every = 0
    config.train.save_every = 0
    config.eval.checkpoint = "last"  # all arms train equally long; early stopping would favour some
    config.eval.val_limit = 8
    config.eval.limit = 100
    config.eval.max_new_tokens = 64
    config.eval.batch_questions = 32
    config.study.explanations = 16
    config.study.benchmark = ("sample",)
    return config
