"""The tokens that hold a picture's places in a prompt."""

from __future__ import annotations

from typing import Any

from sqa_jax.errors import UserError


def check_token(tokenizer: Any, token: str, number: int) -> None:
    """Raises `UserError` unless the tokenizer gives the token the id that the model knows it by."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found != number:
        raise UserError(
            f"the tokenizer has {token} as {found}, the model as {number}; use the tokenizer that the model was "
            "published with"
        )
