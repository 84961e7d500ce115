"""From the study's configuration to its runs, each with a configuration of its own, all checked before any starts."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sqa_jax.adapters import METHODS, check_methods
from sqa_jax.batches.config_data import config_records, training_problems
from sqa_jax.config import default
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import read_replies, records_by_pid
from sqa_jax.errors import UserError
from sqa_jax.prompts.recipes import ARMS, Records, Unusable, check_recipe, examples

# An untrained student, and the recipe arm whose prompt it is given.
ZERO_SHOT = {"zero_shot": "golden_answer_only", "zero_shot_lecture": "golden_lecture"}
NO_ADAPTER = "none"
# Settings that no override may touch: what is measured, on which questions, and what makes a run the cell that it is.
_THE_STUDYS = (
    "seed", "student.path", "recipe.arm", "adapter.methods", "data.source", "data.path", "data.splits", "data.images",
    "data.cache", "eval.split", "eval.limit", "eval.folder", "eval.checkpoint", "study.", "teach.", "mesh.",
)  # fmt: skip


class Run(NamedTuple):
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
    """A student's path as a name for folders and tables: "SmolLM2-135M-Instruct.Q4_1.gguf" → "SmolLM2-135M-Instruct.Q4_1"."""
    name = re.sub(r"\.(gguf|safetensors)$", "", path.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.\-]+", "-", name)


def students(config) -> tuple[str, ...]:
    return tuple(config.study.students) or (config.student.path,)


def runs_of(config) -> list[Run]:
    """All runs, in the order in which they are made: a whole first seed before the second.

    Raises:
      UserError: an arm, adapter, seed or student is not known or is there twice, or nothing would be trained.
    """
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
    names = [student_name(path) for path in students(config)]
    if len(set(names)) != len(names) or "" in names:
        raise UserError(
            f"config.study.students (or config.student.path) gives the names {names}; each must be one of its own"
        )
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
            f"config.study.reference is {study.reference!r}, which is no trained arm of config.study.arms; it says how long all "
            "arms train: choose one of them, or set --config.study.equal=epochs"
        )
    runs = [Run(path, arm, NO_ADAPTER, seeds[0]) for path in students(config) for arm in study.arms if arm in ZERO_SHOT]
    return runs + [
        Run(path, arm, adapter, seed)
        for path in students(config)
        for seed in seeds
        for adapter in study.adapters
        for arm in study.arms
        if arm in ARMS
    ]  # fmt: skip


def run_config(config, run: Run):
    """The configuration of one run: the study's, with what the run fixes and the overrides that name it."""
    own = config.copy_and_resolve_references()
    own.study, own.teach = (
        default().study,
        default().teach,
    )  # of no matter to a single run, so that a study may grow without making runs anew
    own.student.path, own.seed = run.student, run.seed
    own.recipe.arm = ZERO_SHOT.get(run.arm, run.arm)
    if run.trained:
        own.adapter.methods = tuple(run.adapter.split("+"))
        if config.study.same_questions:
            own.recipe.require = tuple(
                dict.fromkeys(k for arm in config.study.arms if arm in ARMS for k in ARMS[arm].kinds)
            )
    else:
        own.eval.checkpoint = "none"
    for selector, key, value in _overrides(config):
        if selector in (run.arm, run.adapter, student_name(run.student)):
            _override(own, selector, key, value)
    return own


def _overrides(config) -> list[tuple[str, str, object]]:
    """(selector, key, value) of each "selector key=value"."""
    known = {*ARMS, *ZERO_SHOT, *METHODS, *config.study.adapters, *map(student_name, students(config))}
    parsed = []
    for text in config.study.overrides:
        match = re.fullmatch(r"(\S+)\s+([\w.]+)=(.+)", text)
        if not match:
            raise UserError(
                f'config.study.overrides: {text!r}: write "which key=value", as in "prefix optimizer.learning_rate=2e-2"'
            )
        selector, key, literal = match.groups()
        if key.startswith(_THE_STUDYS):
            raise UserError(
                f"config.study.overrides: {text!r}: {key} is the same for all runs or set by the study itself, or its "
                "arms could not be compared; set it as --config." + key
            )
        if selector not in known:
            raise UserError(
                f"config.study.overrides: {text!r}: no arm, adapter or student is called {selector}; there are {', '.join(sorted(known))}"
            )
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            value = literal
        if isinstance(value, dict):
            raise UserError(
                f"config.study.overrides: {text!r}: name one setting, such as {key}.{next(iter(value), 'x')}"
            )
        parsed.append((selector, key, value))
    return parsed


def _override(config, selector: str, key: str, value: object) -> None:
    try:
        config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())[:120]
        raise UserError(f"config.study.overrides: {selector} {key}={value!r}: {reason}") from None


def check(config, runs: Sequence[Run], problems: ProblemSet) -> dict[str, int]:
    """Checks, without loading a student, that every run can be made, so that no hours are spent before one cannot.

    Returns:
      {arm: training questions that make an example}, of the first seed.

    Raises:
      UserError: an arm lacks its teacher records, training and evaluation share a question, a student is not there,
        or a run's settings do not go together.
    """
    from sqa_jax.checkpoints.paths import locate
    from sqa_jax.inference.answer import answer_mode

    for path in students(config):
        if not path.startswith("random:"):
            locate(path, config.student.revision, weights=False)
    known = problems.all()
    _say_left_out(config.study.benchmark, known)
    held_out = {p.pid for name in (config.eval.split, config.eval.val_split) for p in problems.split(name)}
    lacking = {
        run.arm for run in runs if run.trained and ARMS[run.arm].kinds and not run_config(config, run).data.teacher
    }
    if lacking:
        raise UserError(
            f"config.study.arms: {', '.join(sorted(lacking))} learn from a teacher's replies, and config.data.teacher names "
            "none; name files of them (python -m sqa_jax.teach makes them), or ('sample',), or leave these arms out"
        )
    used: dict[str, int] = {}
    replies: dict[tuple[str, ...], Mapping[str, Records]] = {}
    for run in runs:
        own = run_config(config, run)
        answer_mode(own)
        train = problems.split(own.data.train_split)
        if shared := [p.pid for p in train if p.pid in held_out]:
            raise UserError(
                f"split {own.data.train_split!r} shares {len(shared)} questions (first {shared[0]}) with {config.eval.split!r} or "
                f"{config.eval.val_split!r}; what is trained on cannot be measured on: choose other splits"
            )
        if not run.trained or run.arm in used:
            continue
        check_recipe(own.recipe, bool(own.data.teacher))
        files = tuple(own.data.teacher)
        if files not in replies:
            replies[files] = records_by_pid(config_records(own, problems))
            _say_left_out(files, known)
        reasons: dict[str, int] = {}
        used[run.arm] = 0
        for problem in training_problems(own, problems):
            made = examples(problem, replies[files].get(problem.pid, {}), own.recipe)
            bad = [one.reason for one in made if isinstance(one, Unusable)]
            used[run.arm] += len(bad) < len(made)
            for reason in bad:
                reasons[reason] = reasons.get(reason, 0) + 1
        if not used[run.arm]:
            why = "; ".join(f"{reason}: {count}" for reason, count in reasons.items()) or "no training question"
            raise UserError(
                f"arm {run.arm} has no training example ({why}); add the replies it needs to config.data.teacher, or leave it out of config.study.arms"
            )
    return used


def _say_left_out(files: Sequence[str], known: Mapping[str, Problem]) -> None:
    """Says which replies are left out, because the data does not have their questions."""
    for file in files:
        rows = read_replies(file) if file != "sample" else []
        if strange := [row["pid"] for row in rows if row["pid"] not in known]:
            print(
                f"{file}: {len(strange)} of {len(rows)} replies are for questions that are not in the data (first "
                f"{strange[0]}), and are left out",
                flush=True,
            )
