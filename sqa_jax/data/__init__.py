"""Questions, prompts, recipes and the pre-tokenized distillation datasets made of them."""
