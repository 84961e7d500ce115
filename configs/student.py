"""Any published student on ScienceQA: --config configs/student.py:NAME,METHOD,…, such as student.py:qwen3-0.6b,lora.

NAME is one of `sqa_jax.models.catalogue`, METHOD one or more of lora, prefix, prompt, or full. Rows and steps are
sized for an accelerator; learning rates are starting points, not tuned values.
"""

from sqa_jax.adapters import METHODS
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.catalogue import CATALOGUE

_RATES = {"lora": 1e-3, "prefix": 1e-2, "prompt": 3e-2, "full": 2e-5}
_LARGE = 1500  # hidden size from which on LoRA gets a fifth of the rate


def get_config(which="smollm2-135m,lora"):
    name, *methods = which.split(",")
    if name not in CATALOGUE:
        raise UserError(f"configs/student.py: no student is called {name!r}; choose of {', '.join(CATALOGUE)}")
    if unknown := [method for method in methods if method not in METHODS]:
        raise UserError(f"configs/student.py: {unknown[0]!r} is no method; choose of {', '.join(METHODS)}")
    config = default()
    config.data.source = "hub"
    config.student.path = CATALOGUE[name].hub
    config.adapter.methods = tuple(methods or ["lora"])
    config.recipe.answer = "text"
    config.recipe.caption = (
        CATALOGUE[name].config.vision is None
    )  # a vision-language model needs no caption of the image
    config.train.row_length = 1024
    config.train.batch_rows = 8
    config.eval.row_length = 1024
    rate = min(_RATES[method] for method in config.adapter.methods)
    large = "lora" in config.adapter.methods and CATALOGUE[name].config.hidden_size >= _LARGE
    config.optimizer.learning_rate = rate / 5 if large else rate
    return config
