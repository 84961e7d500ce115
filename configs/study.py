"""The study on ScienceQA: --config.data.path names its directory, --config.data.teacher the recorded replies.

All arms with LoRA and three seeds, sized for one accelerator. On a CPU take fewer questions and one seed:
--config.study.seeds="(0,)" --config.data.train_limit=500 --config.eval.limit=400.
"""

from configs.scienceqa import get_config as scienceqa


def get_config():
    config = scienceqa()
    config.recipe.format = "QCM-AE"
    config.recipe.max_prompt = 256
    config.recipe.max_target = 256
    config.train.eval_every = 30
    config.eval.checkpoint = "last"  # all arms train equally long; early stopping would favour some
    config.eval.max_new_tokens = 160
    config.study.seeds = (0, 1, 2)
    config.study.explanations = 48
    # Learning rates of the adapters; LoRA's is that of configs/scienceqa.py.
    config.study.overrides = (
        "prefix optimizer.learning_rate=2e-2",
        "prompt optimizer.learning_rate=5e-2",
        "full optimizer.learning_rate=1e-4",
    )
    return config
