"""A run's directory, and the guard that it belongs to one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.files import read_json, write_json

# Settings that change what a run shows or how it is cut into pieces, never what it computes.
_FREE = ("data.cache", "train.log_every", "train.eval_every", "train.save_every", "train.stop_after", "eval.", "mesh.")


def claim(workdir: str | Path, config, fingerprints: dict[str, str]) -> Path:
    """Makes the directory the run's own, or checks that it is.

    Args:
      fingerprints: of what else decides the run (student, dataset).

    Raises:
      UserError: it belongs to another configuration; the settings that differ are named.
    """
    workdir = Path(workdir)
    mine = {"config": config.to_dict(), **fingerprints}
    file = workdir / "config.json"
    if not file.exists():
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir {workdir}: is a file; name a directory")
        write_json(file, mine)
        return workdir
    theirs = read_json(file, "the configuration of this workdir")
    ours, their = _flatten(mine), _flatten(theirs)
    differing = sorted(
        key for key in ours.keys() | their.keys()
        if ours.get(key) != their.get(key) and not key.removeprefix("config.").startswith(_FREE)
    )  # fmt: skip
    if differing:
        shown = ", ".join(f"{key} was {their.get(key)!r} and is {ours.get(key)!r}" for key in differing[:3])
        raise UserError(
            f"{workdir}: belongs to another configuration ({shown}); choose another --workdir or the same settings"
        )
    return workdir


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{prefix}{key}.").items()}
    if isinstance(value, tuple):
        value = list(value)  # as JSON has it
    return {prefix.rstrip("."): value}
