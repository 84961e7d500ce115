"""Soft prompts on vision-language models (H2): one zero-shot, with soft prompts and with LoRA, beside a model of text.

On ScienceQA: --config.data.source=hub, or --config.data.source=dir with --config.data.path; --config.data.teacher names
recorded replies. The model of text gets the images' captions, which the other does not need.
"""

from configs.study import get_config as study


def get_config():
    config = study()
    config.recipe.format = "QCM-AE"
    config.recipe.caption = False
    config.train.row_length = 1024
    config.study.students = ("google/paligemma2-3b-mix-224", "HuggingFaceTB/SmolLM2-1.7B-Instruct")
    config.study.arms = ("zero_shot", "golden", "teacher_answer")
    config.study.adapters = ("prompt", "prefix", "lora")
    config.study.explanations = 0
    config.study.overrides = (*config.study.overrides, "SmolLM2-1.7B-Instruct recipe.caption=True")
    return config
