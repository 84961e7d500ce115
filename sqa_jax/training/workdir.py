"""A run's directory: its config.json, and the check that it belongs to one configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sqa_jax import cli
from sqa_jax.bucket import bucket_errors, check_access, in_bucket
from sqa_jax.config import default
from sqa_jax.config_aliases import current_names
from sqa_jax.errors import UserError
from sqa_jax.files import as_path, read_json, write_json

# Where the student is stored (its fingerprint identifies it) and how it is computed: evaluation may change these.
_STORAGE_AND_COMPUTE = (
    "student.path",
    "student.revision",
    "student.dtype",
    "student.remat",
    "student.attention",
    "student.cache_features",
)
# Settings that change what a run reports or how it is divided, never its results: a continued run may change these.
_CHANGEABLE = (
    "data.cache",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.stop_after",
    "train.profile_steps",
    "eval.",
    "mesh.",
    "study.",
    "teach.",
    "plan.",
)


def open_workdir(workdir: str | Path) -> Path:
    """The path of --workdir, on a disk or in a bucket; every process calls it first.

    Raises:
      UserError: it is in a bucket that this process may not read and write, or that cannot be reached.
    """
    root = as_path(workdir)
    if in_bucket(root):
        check_access(root)
    return root


def bind_config(workdir: str | Path, config, fingerprints: dict[str, str]) -> Path:
    """Writes config.json into a new directory; in an existing one, checks that the configuration is the same.

    Args:
      fingerprints: of everything else that decides the run (student, dataset).

    Raises:
      UserError: it belongs to another configuration; the settings that differ are named.
    """
    workdir = as_path(workdir)
    current = {"config": config.to_dict(), **fingerprints}
    file = workdir / "config.json"
    with bucket_errors(workdir):
        exists = file.exists()
    if not exists:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir {workdir}: is a file; name a directory")
        write_json(file, current)
        return workdir
    _refuse(workdir, _differing(current, read_saved(file), lambda key: not key.startswith(_CHANGEABLE)))
    return workdir


def check_evaluable(workdir: str | Path, config, student: str) -> None:
    """Checks that a run is evaluated with the student, prompts and adapter that it was trained with.

    Raises:
      UserError: it is not; the settings that differ are named.
    """
    workdir = as_path(workdir)
    trained = read_saved(workdir / "config.json")
    trained["config"] = with_defaults(trained["config"]).to_dict()
    current = {"config": config.to_dict(), "student": student}
    _refuse(
        workdir,
        _differing(
            current,
            trained,
            lambda key: key.startswith(("recipe.", "adapter.", "student")) and key not in _STORAGE_AND_COMPUTE,
        ),
    )


def _differing(
    current: dict[str, Any], saved: dict[str, Any], is_compared: Callable[[str], bool]
) -> list[tuple[str, Any, Any]]:
    """(key, saved, current) of the values that differ.

    Args:
      is_compared: by the key without its leading "config.".
    """
    now, before = (flatten(json.loads(json.dumps(side))) for side in (current, saved))  # tuples become lists
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and is_compared(key.removeprefix("config."))
    ]


def _refuse(workdir: Path, differing: list[tuple[str, Any, Any]]) -> None:
    if differing:
        raise UserError(
            f"{workdir}: belongs to another configuration ({described(differing)}); choose another --workdir or the same settings"
        )


def described(differing: Sequence[tuple[str, Any, Any]]) -> str:
    """The first three of (key, before, now) as text."""
    return ", ".join(f"{key} was {before!r} and is {now!r}" for key, before, now in differing[:3])


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"b1": 0.9}} → {"optimizer.b1": 0.9}."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {prefix + key: inner}
    return flat


def read_saved(file: Path) -> dict[str, Any]:
    """A run's config.json with today's names of settings: {"config": nested, "student": fingerprint, …}.

    Raises:
      UserError: it is missing or damaged.
    """
    saved = read_json(file, "the configuration of this run")
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{file}: holds no configuration of a run; the file is damaged, choose another --workdir")
    return {**saved, "config": current_names(saved["config"], str(file))}


def with_defaults(saved: Mapping[str, Any]) -> ConfigDict:
    """A saved configuration, with today's defaults of the settings that did not exist when it was saved.

    Raises:
      UserError: a value has another type today.
    """
    config = default().unlock()
    try:
        config.update(saved)
    except TypeError as error:
        raise UserError(f"the saved configuration is from another version of sqa_jax: {error}; give --config") from None
    return config.lock()


def run_config(workdir: str):
    """The configuration of a run: --config where given, else the run's config.json with the command line's overrides."""
    from ml_collections import config_flags

    file = open_workdir(workdir) / "config.json"
    if cli.given_config(sys.argv) is not None or not file.exists():
        return flags.FLAGS.config
    config = with_defaults(read_saved(file)["config"])
    config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
    return config.lock()
