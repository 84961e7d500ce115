"""A run's directory, and the guard that it belongs to one configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.bucket import bucket_errors, check_access, in_bucket
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
    _refuse(
        workdir,
        _differing(mine, read_json(file, "the configuration of this workdir"), lambda key: not key.startswith(_FREE)),
    )
    return workdir


def check_evaluable(workdir: str | Path, config, student: str) -> None:
    """Checks that a run is evaluated with the student, the prompts and the adapter that it was trained with.

    Raises:
      UserError: it is not; the settings that differ are named.
    """
    workdir = as_path(workdir)
    trained = read_json(workdir / "config.json", "the configuration of this run")
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
    mine, other = flatten(json.loads(json.dumps(ours))), flatten(theirs)  # tuples are lists, as in the file
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
