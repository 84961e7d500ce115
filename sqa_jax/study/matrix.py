"""The matrix of runs: from the study's configuration to its runs, and the configuration of each."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from sqa_jax.adapters import METHODS, check_methods
from sqa_jax.config import default
from sqa_jax.config_aliases import current_key, current_value
from sqa_jax.errors import UserError
from sqa_jax.prompts.recipes import ARMS

# An untrained student, and the recipe arm whose prompt it gets.
ZERO_SHOT = {"zero_shot": "golden_answer_only", "zero_shot_lecture": "golden_lecture"}
NO_ADAPTER = "none"
# Settings that no override may change: the questions, the evaluation, and the coordinates of a run in the matrix.
_FIXED_BY_STUDY = (
    "seed", "student.path", "recipe.arm", "adapter.methods", "data.source", "data.path", "data.splits", "data.images",
    "data.cache", "eval.split", "eval.limit", "eval.folder", "eval.checkpoint", "study.", "teach.", "mesh.",
)  # fmt: skip


class StudyRun(NamedTuple):
    """One cell of the matrix. An untrained student has the adapter "none" and the study's first seed."""

    student: str
    arm: str
    adapter: str
    seed: int

    @property
    def trained(self) -> bool:
        return self.arm not in ZERO_SHOT

    def folder(self, root: Path) -> Path:
        return root / "runs" / student_name(self.student) / self.arm / self.adapter / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{student_name(self.student)}, {self.arm}, {self.adapter}, seed {self.seed}"


def student_name(path: str) -> str:
    """A student's path as a name for folders and tables: "a/SmolLM2-135M.Q4_1.gguf" → "SmolLM2-135M.Q4_1"."""
    name = re.sub(r"\.(gguf|safetensors)$", "", path.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.\-]+", "-", name)


def student_paths(config) -> tuple[str, ...]:
    """The paths of the study's students."""
    return tuple(config.study.students) or (config.student.path,)


def study_runs(config) -> list[StudyRun]:
    """All runs in the order of execution: the untrained students, then a whole first seed before the second.

    Raises:
      UserError: an arm, adapter, seed or student is unknown or repeated, or nothing would be trained.
    """
    _check_axes(config)
    _check_design(config.study)
    study, paths = config.study, student_paths(config)
    untrained = [
        StudyRun(path, arm, NO_ADAPTER, study.seeds[0]) for path in paths for arm in study.arms if arm in ZERO_SHOT
    ]
    return untrained + [
        StudyRun(path, arm, adapter, seed)
        for path in paths
        for seed in study.seeds
        for adapter in study.adapters
        for arm in study.arms
        if arm in ARMS
    ]


def _check_axes(config) -> None:
    """Checks the arms, adapters, seeds and students."""
    study = config.study
    for name in ("arms", "adapters", "seeds"):
        values = tuple(study[name])
        if not values or len(set(values)) != len(values):
            raise UserError(f"config.study.{name} is {values}; name one or more, each once")
    for arm in study.arms:
        if arm not in ARMS and arm not in ZERO_SHOT:
            raise UserError(f"config.study.arms names {arm!r}; choose of {', '.join((*ZERO_SHOT, *ARMS))}")
    for adapter in study.adapters:
        check_methods(adapter.split("+"))
    if config.adapter.peft:
        raise UserError("config.adapter.peft: the arms of a study train new adapters; leave it empty")
    if not any(arm in ARMS for arm in study.arms):
        raise UserError("config.study.arms trains nothing; name at least one arm besides the untrained student's")
    if config.eval.folder or config.eval.checkpoint not in ("best", "last"):
        raise UserError(
            f"config.eval.folder is {config.eval.folder!r} and config.eval.checkpoint {config.eval.checkpoint!r}; a study "
            "names the folders itself, and evaluates the best or the last checkpoint"
        )
    names = [student_name(path) for path in student_paths(config)]
    if len(set(names)) != len(names) or "" in names:
        raise UserError(
            f"config.study.students (or config.student.path) gives the names {names}; each must be different and not empty"
        )


def _check_design(study) -> None:
    """Checks how runs are compared: resampling, and what arms have in common."""
    seeds = tuple(study.seeds)
    if study.resample == "questions_and_seeds" and len(seeds) < 2:
        raise UserError(
            "config.study.resample is questions_and_seeds, which needs pairs of two or more seeds, and "
            f"config.study.seeds is {seeds}; name more seeds, or set --config.study.resample=questions"
        )
    if study.resample not in ("questions", "questions_and_seeds"):
        raise UserError(f"config.study.resample is {study.resample!r}; choose questions or questions_and_seeds")
    if study.equal not in ("tokens", "epochs"):
        raise UserError(f"config.study.equal is {study.equal!r}; choose tokens or epochs")
    if study.equal == "tokens" and (study.reference not in study.arms or study.reference in ZERO_SHOT):
        raise UserError(
            f"config.study.reference is {study.reference!r}, which is no trained arm of config.study.arms; its training "
            "tokens set the length of all arms: choose one of them, or set --config.study.equal=epochs"
        )


def config_of_run(config, run: StudyRun):
    """The configuration of one run: the study's, with the run's coordinates and the overrides that apply to it."""
    run_config = config.copy_and_resolve_references()
    # Irrelevant to a single run: a study may grow without making runs anew.
    run_config.study, run_config.teach = default().study, default().teach
    run_config.student.path, run_config.seed = run.student, run.seed
    run_config.recipe.arm = ZERO_SHOT.get(run.arm, run.arm)
    if run.trained:
        run_config.adapter.methods = tuple(run.adapter.split("+"))
        if config.study.same_questions:
            kinds = [kind for arm in config.study.arms if arm in ARMS for kind in ARMS[arm].kinds]
            run_config.recipe.require = tuple(dict.fromkeys(kinds))
    else:
        run_config.eval.checkpoint = "none"
    for selector, key, value in _overrides(config):
        if selector in (run.arm, run.adapter, student_name(run.student)):
            _override(run_config, selector, key, value)
    return run_config


def _overrides(config) -> list[tuple[str, str, object]]:
    """(selector, key, value) of each "selector key=value" in config.study.overrides."""
    known = {*ARMS, *ZERO_SHOT, *METHODS, *config.study.adapters, *map(student_name, student_paths(config))}
    return [_parse_override(text, known) for text in config.study.overrides]


def _parse_override(text: str, selectors: set[str]) -> tuple[str, str, object]:
    match = re.fullmatch(r"(\S+)\s+([\w.]+)=(.+)", text)
    if not match:
        raise UserError(
            f'config.study.overrides: {text!r}: write "which key=value", as in "prefix optimizer.learning_rate=2e-2"'
        )
    selector, key, literal = match.groups()
    key = current_key(key)
    if key.startswith(_FIXED_BY_STUDY):
        raise UserError(
            f"config.study.overrides: {text!r}: {key} is the same for all runs or set by the study itself, or its "
            "arms could not be compared; set it as --config." + key
        )
    if selector not in selectors:
        raise UserError(
            f"config.study.overrides: {text!r}: no arm, adapter or student is called {selector}; there are {', '.join(sorted(selectors))}"
        )
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        value = literal
    if isinstance(value, dict):
        raise UserError(f"config.study.overrides: {text!r}: name one setting, such as {key}.{next(iter(value), 'x')}")
    return selector, key, current_value(key, value)


def _override(config, selector: str, key: str, value: object) -> None:
    try:
        config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())[:120]
        raise UserError(f"config.study.overrides: {selector} {key}={value!r}: {reason}") from None
