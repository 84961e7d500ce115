"""The plan, or the sweep, of a configuration on a named topology."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqa_jax.checkpoints.load import student_config
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.chips import topology
from sqa_jax.plan.epoch_stats import epoch_stats
from sqa_jax.plan.report import plan_generation, plan_training
from sqa_jax.plan.sweep import sweep


class _Target(NamedTuple):
    """A student and the devices to compile for."""

    student: StudentConfig
    kind: str
    devices: list[Any]


def make_plan(config: Any, name: str, slices: int, programs: tuple[str, ...]) -> dict[str, Any]:
    """The plan of a configuration's programs on a topology.

    Args:
      name: of the topology, as "v5e:4x4".
      programs: any of "train", "generate".

    Returns:
      topology, slices, chips, chip, student, methods, and each program's plan under its name.

    Raises:
      UserError: there is no such topology, libtpu is missing, or configuration and slice do not fit each other.
    """
    target = _target(config, name, slices)
    result = _header(config, name, slices, target)
    if "train" in programs:
        result["train"] = plan_training(config, *target, epoch_stats(config, target.student))
    if "generate" in programs:
        result["generate"] = plan_generation(config, *target)
    return result


def make_sweep(config: Any, name: str, slices: int, max_compiles: int, rows: int) -> dict[str, Any]:
    """As `make_plan`, with a sweep of the training step under "sweep": see `sqa_jax.plan.sweep`."""
    target = _target(config, name, slices)
    rows_of_sweep = sweep(config, *target, epoch_stats(config, target.student), max_compiles, rows)
    return {**_header(config, name, slices, target), "sweep": rows_of_sweep}


def _target(config: Any, name: str, slices: int) -> _Target:
    kind, devices = topology(name, slices)
    student = student_config(config.student.path, config.student.revision, config.student.max_image_tokens)
    return _Target(student, kind, devices)


def _header(config: Any, name: str, slices: int, target: _Target) -> dict[str, Any]:
    return {
        "topology": name, "slices": slices, "chips": len(target.devices), "chip": target.kind,
        "student": config.student.path, "methods": list(config.adapter.methods),
    }  # fmt: skip
