"""The benchmark's default configuration: LoRA on the 135M student, about eight questions a step."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.student.path = "weights/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.recipe.format = "QCM-AE"
    config.recipe.answer = "text"
    config.recipe.chat = False
    config.recipe.max_prompt = 256
    config.recipe.max_target = 256
    config.train.row_length = 512
    config.train.batch_rows = 3
    config.train.steps = 10  # two of them before the clock starts
    config.eval.limit = 64
    config.eval.row_length = 512
    config.eval.batch_rows = 2
    config.eval.batch_questions = 32
    config.eval.max_new_tokens = 64
    return config
