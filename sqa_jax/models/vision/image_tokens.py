"""Image tokens: the placeholders that an image's features take the place of in a prompt."""

from __future__ import annotations

from typing import Any

from sqa_jax.errors import UserError


def check_token(tokenizer: Any, token: str, expected_id: int) -> None:
    """Raises `UserError` unless the tokenizer gives a token the id that the model has for it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found != expected_id:
        raise UserError(
            f"the tokenizer has {token} as {found}, the model as {expected_id}; use the tokenizer that the model was "
            "published with"
        )
