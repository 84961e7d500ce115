"""Configurations as fingerprints hash them: under the field names that they had first.

Renaming a field then changes no fingerprint, so that saved runs and caches of before stay valid.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_ORIGINAL_NAMES = {"encoder": "tower", "prefix_lm": "prompt_both_ways"}


def original_fields(config: Any) -> dict[str, Any]:
    """A configuration (a dataclass) as nested dictionaries with the original field names."""
    return _renamed(dataclasses.asdict(config))


def non_default_fields(config: Any) -> dict[str, Any]:
    """`original_fields` without those that have their default, so that a new option changes no fingerprint."""
    defaults = {_ORIGINAL_NAMES.get(field.name, field.name): field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in original_fields(config).items() if value != defaults[name]}


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        _ORIGINAL_NAMES.get(name, name): _renamed(value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
