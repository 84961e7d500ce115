"""Renamed settings: the old name of a key or of a value is understood for one release, and one line says the new one."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from typing import Any

from sqa_jax.errors import UserError

# {old key: new key}, without the leading "config."; a key stays in its section.
RENAMED: dict[str, str] = {
    "student.picture_tokens": "student.max_image_tokens",
    "adapter.lora.tower": "adapter.lora.vision_encoder",
    "adapter.prompt.behind_picture": "adapter.prompt.after_image",
}
# {key under its new name: {old value: new value}}.
RENAMED_VALUES: dict[str, dict[str, str]] = {
    "data.source": {"pictures": "image-questions", "pictures-shifted": "image-questions-shifted"},
}

_announced: set[str] = set()  # by this command already


def current_key(key: str) -> str:
    """Today's name of a setting; a renamed one is announced."""
    new = RENAMED.get(key, key)
    if new != key:
        _announce(f"config.{key} is now called config.{new}")
    return new


def current_value(key: str, value: Any) -> Any:
    """Today's name of a value of `key`; a renamed one is announced."""
    new = RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
    if new != value:
        _announce(f"config.{key}={value} is now called {new}")
    return new


def current_arguments(argv: list[str]) -> list[str]:
    """A command line with the old names replaced; announcements start anew.

    Raises:
      UserError: a setting is given under both names.
    """
    _announced.clear()
    arguments, given, key = list(argv), {}, ""
    for k, argument in enumerate(arguments):
        match = re.fullmatch(r"(--?(?:no)?config\.)([^=]+)(=.*)?", argument, re.DOTALL)
        if not match:  # "--config.key value": the value of the argument before
            arguments[k] = current_value(key, argument) if key else argument
            key = ""
            continue
        flag, name, value = match.groups()
        key = current_key(name)
        if given.setdefault(key, name) != name:
            refuse_both("command line", *sorted((name, given[key]), key=key.__eq__))
        if value is not None:
            arguments[k], key = f"{flag}{key}={current_value(key, value[1:])}", ""
        else:
            arguments[k] = f"{flag}{key}"
    return arguments


def current_names(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A saved configuration with today's names.

    Args:
      config: nested, as in a run's config.json.
      where: the file, for the error.

    Raises:
      UserError: a setting is there under both names.
    """
    config = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        section, name = _section(config, old)
        if name in section:
            current_key(old)
            value, name = section.pop(name), new.rpartition(".")[2]
            if name in section:
                refuse_both(where, old, new)
            section[name] = value
    for key in RENAMED_VALUES:
        section, name = _section(config, key)
        if name in section:
            section[name] = current_value(key, section[name])
    return config


def original_names(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings under the names that they had first: what identities are hashed from, so that renaming changes none.

    Args:
      config: nested; all settings, or those of the section `prefix`.
    """
    whole: dict[str, Any] = copy.deepcopy(dict(config))
    for part in reversed(prefix.split(".") if prefix else []):
        whole = {part: whole}
    for key, names in RENAMED_VALUES.items():
        section, name = _section(whole, key)
        if isinstance(section.get(name), str):
            section[name] = {new: old for old, new in names.items()}.get(section[name], section[name])
    for old, new in RENAMED.items():
        section, name = _section(whole, new)
        if name in section:
            section[old.rpartition(".")[2]] = section.pop(name)
    for part in prefix.split(".") if prefix else []:
        whole = whole[part]
    return whole


def refuse_both(where: str, old: str, new: str) -> None:
    raise UserError(
        f"{where}: config.{old} and config.{new} are the old and the new name of one setting; keep config.{new} only"
    )


def _section(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section of a nested configuration that a key is in, {} where there is none, and the key's name there."""
    *parents, name = key.split(".")
    for parent in parents:
        config = config.get(parent, {})
    return config, name


def _announce(text: str) -> None:
    if text not in _announced:
        _announced.add(text)
        print(f"note: {text}", file=sys.stderr)
