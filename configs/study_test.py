"""The whole study with a tiny random student, in minutes: to try the verb, and for the tests."""

from configs.test import get_config as tiny


def get_config():
    config = tiny()
    config.data.teacher = ("sample",)
    config.data.train_limit = 16
    config.recipe.format = "QCM-AE"
    config.train.eval_every = 0
    config.train.save_every = 0
    config.eval.val_limit = 4
    config.eval.limit = 24
    config.eval.max_new_tokens = 8
    config.study.seeds = (0, 1)
    config.study.explanations = 2
    config.study.benchmark = ("sample",)
    return config
