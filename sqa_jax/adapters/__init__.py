"""Parameter-efficient fine-tuning: adapters as parameter trees beside a frozen base.

LoRA, prefix tuning, prompt tuning (soft prompts), deep visual prompts, and full fine-tuning as the adapter that is the
whole model; each method is a module with `init`, and `sqa_jax.adapters.adapter` combines them. The names below are the
face for all methods. `peft_format` writes and `peft_read` reads the files of Hugging Face's PEFT.
"""

from sqa_jax.adapters.adapter import (
    METHODS,
    adapter_inputs,
    check_methods,
    init_adapter,
    merge,
    model_params,
    prompt_text_tokens,
    soft_prompt_tokens,
)

__all__ = [
    "METHODS",
    "adapter_inputs",
    "check_methods",
    "init_adapter",
    "merge",
    "model_params",
    "prompt_text_tokens",
    "soft_prompt_tokens",
]
