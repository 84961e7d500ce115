"""Checks that every run of a study can be made, before the first one starts and without loading a student."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from sqa_jax.batches.config_data import config_records, training_problems
from sqa_jax.checkpoints.paths import locate
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import read_replies, records_by_pid
from sqa_jax.errors import UserError
from sqa_jax.inference.answer import answer_mode
from sqa_jax.prompts.recipes import ARMS, Records, Unusable, check_recipe, examples
from sqa_jax.study.matrix import StudyRun, config_of_run, student_paths


def check_study(config, runs: Sequence[StudyRun], problems: ProblemSet) -> dict[str, int]:
    """Checks every run.

    Returns:
      {arm: training questions with at least one usable example}, of the first seed.

    Raises:
      UserError: an arm lacks its teacher records, training and evaluation share a question, a student is missing,
        or the settings of a run contradict each other.
    """
    for path in student_paths(config):
        if not path.startswith("random:"):
            locate(path, config.student.revision, weights=False)
    known = problems.all()
    _report_unknown_questions(config.study.benchmark, known)
    _check_teachers(config, runs)
    usable: dict[str, int] = {}
    replies: dict[tuple[str, ...], Mapping[str, Records]] = {}
    for run in runs:
        run_config = config_of_run(config, run)
        answer_mode(run_config)
        _check_splits(run_config, config.eval, problems)
        if not run.trained or run.arm in usable:
            continue
        check_recipe(run_config.recipe, bool(run_config.data.teacher))
        files = tuple(run_config.data.teacher)
        if files not in replies:
            replies[files] = records_by_pid(config_records(run_config, problems))
            _report_unknown_questions(files, known)
        usable[run.arm] = _usable_questions(run_config, run.arm, problems, replies[files])
    return usable


def _check_teachers(config, runs: Sequence[StudyRun]) -> None:
    lacking = {
        run.arm for run in runs if run.trained and ARMS[run.arm].kinds and not config_of_run(config, run).data.teacher
    }
    if lacking:
        raise UserError(
            f"config.study.arms: {', '.join(sorted(lacking))} learn from a teacher's replies, and config.data.teacher names "
            "none; name files of them (python -m sqa_jax.teach makes them), or ('sample',), or leave these arms out"
        )


def _check_splits(run_config, evaluation, problems: ProblemSet) -> None:
    """Refuses a training split that shares questions with the splits of evaluation and validation."""
    split = run_config.data.train_split
    held_out = {p.pid for name in (evaluation.split, evaluation.val_split) for p in problems.split(name)}
    if shared := [p.pid for p in problems.split(split) if p.pid in held_out]:
        raise UserError(
            f"split {split!r} shares {len(shared)} questions (first {shared[0]}) with {evaluation.split!r} or "
            f"{evaluation.val_split!r}; training questions cannot be evaluated on: choose other splits"
        )


def _usable_questions(run_config, arm: str, problems: ProblemSet, replies: Mapping[str, Records]) -> int:
    """Training questions of an arm that give at least one example.

    Raises:
      UserError: none does; it says why.
    """
    usable, reasons = 0, collections.Counter[str]()
    for problem in training_problems(run_config, problems):
        built = examples(problem, replies.get(problem.pid, {}), run_config.recipe)
        unusable = [example.reason for example in built if isinstance(example, Unusable)]
        usable += len(unusable) < len(built)
        reasons.update(unusable)
    if not usable:
        why = "; ".join(f"{reason}: {count}" for reason, count in reasons.items()) or "no training question"
        raise UserError(
            f"arm {arm} has no training example ({why}); add the replies it needs to config.data.teacher, or leave it "
            "out of config.study.arms"
        )
    return usable


def _report_unknown_questions(files: Sequence[str], known: Mapping[str, Problem]) -> None:
    """Prints how many replies are ignored because their questions are not in the data."""
    for file in files:
        rows = read_replies(file) if file != "sample" else []
        if unknown := [row["pid"] for row in rows if row["pid"] not in known]:
            print(
                f"{file}: {len(unknown)} of {len(rows)} replies are for questions that are not in the data (first "
                f"{unknown[0]}), and are left out",
                flush=True,
            )
