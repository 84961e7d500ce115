"""A student with its adapter, as evaluation, the agent and export open it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqa_jax.adapters.peft_read import resolve_peft_adapter
from sqa_jax.config_aliases import original_names
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.runtime import Runtime, build_runtime
from sqa_jax.training.restore import check_checkpoint, restore_adapter
from sqa_jax.training.workdir import check_evaluable


class AdaptedStudent(NamedTuple):
    """A loaded student and its adapter.

    Attributes:
      config: the configuration; its `adapter` holds the settings of a PEFT adapter, where it names one.
      adapter: parameters of the adapter; {} for the bare student.
      base: the student's parameters; {} where the adapter replaces all of them.
      step: training step of the checkpoint; None without one.
      peft: fingerprint of a PEFT adapter's files; None without one.
    """

    config: Any
    runtime: Runtime
    adapter: ParamTree
    base: ParamTree
    step: int | None
    peft: str | None

    def identity(self, problem_set: ProblemSet, problems: Sequence[Problem]) -> dict[str, Any]:
        """What decides predictions besides how the questions are asked; hashed by `Predictions`."""
        return {
            "recipe": original_names(self.config.recipe.to_dict(), "recipe"),
            "adapter": original_names(self.config.adapter.to_dict(), "adapter") if self.adapter else None,
            "student": self.runtime.student.fingerprint,
            "problems": [problem.pid for problem in problems],
            "data": problem_set.fingerprint,
            "seed": self.config.seed,
            **({"peft": self.peft} if self.peft else {}),
        }


def open_student(config, root: Path, runtime: Runtime | None = None) -> AdaptedStudent:
    """Loads the checkpoint of the run at ROOT that `config.eval.checkpoint` names.

    Where that is "none": the bare student, or the PEFT adapter that `config.adapter.peft` names on it.

    Args:
      runtime: the loaded student; None loads what the configuration names.

    Raises:
      UserError: there is no such checkpoint, the configuration does not fit it, or the student cannot be loaded.
    """
    check_checkpoint(config, root)
    bare = config.eval.checkpoint == "none"
    config, peft = resolve_peft_adapter(config) if bare else (config, None)
    runtime = runtime or build_runtime(config)
    if not bare:
        check_evaluable(root, config, runtime.student.fingerprint)
    step, adapter = restore_adapter(config, root, runtime, peft)
    base = {} if "full" in adapter else runtime.student.params
    return AdaptedStudent(config, runtime, adapter, base, step, peft.fingerprint if peft else None)
