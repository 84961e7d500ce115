"""A run's directory, and the guard that it belongs to one configuration."""

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

# Settings that change what a run shows or how it is cut into pieces, never what it computes.
# Where the student lies (its fingerprint says what it is) and how it is computed.
_PLACE = (
    "student.path",
    "student.revision",
    "student.dtype",
    "student.remat",
    "student.attention",
    "student.cache_features",
)
_FREE = (
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
    """The path of --workdir, on a disk or in a bucket; the first thing that each process of a run asks for.

    Raises:
      UserError: it is in a bucket that does not let this process read and write, or cannot be reached.
    """
    root = as_path(workdir)
    if in_bucket(root):
        check_access(root)
    return root


def bind_config(workdir: str | Path, config, fingerprints: dict[str, str]) -> Path:
    """Makes the directory the run's own, or checks that it is.

    Args:
      fingerprints: of what else decides the run (student, dataset).

    Raises:
      UserError: it belongs to another configuration; the settings that differ are named.
    """
    workdir = as_path(workdir)
    mine = {"config": config.to_dict(), **fingerprints}
    file = workdir / "config.json"
    with bucket_errors(workdir):
        there = file.exists()
    if not there:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir {workdir}: is a file; name a directory")
        write_json(file, mine)
        return workdir
    _refuse(workdir, _differing(mine, read_saved(file), lambda key: not key.startswith(_FREE)))
    return workdir


def check_evaluable(workdir: str | Path, config, student: str) -> None:
    """Checks that a run is evaluated with the student, the prompts and the adapter that it was trained with.

    Raises:
      UserError: it is not; the settings that differ are named.
    """
    workdir = as_path(workdir)
    trained = read_saved(workdir / "config.json")
    trained["config"] = with_defaults(trained["config"]).to_dict()
    asked = {"config": config.to_dict(), "student": student}
    _refuse(
        workdir,
        _differing(
            asked, trained, lambda key: key.startswith(("recipe.", "adapter.", "student")) and key not in _PLACE
        ),
    )


def _differing(
    ours: dict[str, Any], theirs: dict[str, Any], counts: Callable[[str], bool]
) -> list[tuple[str, Any, Any]]:
    """(key, theirs, ours) where the two differ in a key that counts; keys without the leading "config."."""
    mine, other = (flatten(json.loads(json.dumps(side))) for side in (ours, theirs))  # tuples become lists
    keys = sorted(mine.keys() | other.keys())
    return [
        (key, other.get(key), mine.get(key))
        for key in keys
        if mine.get(key) != other.get(key) and counts(key.removeprefix("config."))
    ]


def _refuse(workdir: Path, differing: list[tuple[str, Any, Any]]) -> None:
    if differing:
        raise UserError(
            f"{workdir}: belongs to another configuration ({described(differing)}); choose another --workdir or the same settings"
        )


def described(differing: Sequence[tuple[str, Any, Any]]) -> str:
    """The first three of (name, before, now), in words."""
    return ", ".join(f"{key} was {theirs!r} and is {ours!r}" for key, theirs, ours in differing[:3])


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
