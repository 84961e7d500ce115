"""Checks of a configuration's numbers, whichever file format it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from sqa_jax.errors import UserError

_KINDS = {"int": int, "float": (int, float)}  # of fields, by annotation


def check_numbers(config: Any, where: str, may_be_zero: Collection[str]) -> None:
    """Checks that the numbers among a dataclass' fields are positive ones, or zero where that means something.

    Raises:
      UserError: one is not; it is named.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type not in _KINDS:
            continue
        number = isinstance(value, _KINDS[field.type]) and not isinstance(value, bool)
        if not number or value < 0 or (value == 0 and field.name not in may_be_zero):
            raise UserError(
                f"{where}: {field.name} is {value!r}, which is not a positive number; fetch the model again"
            )
