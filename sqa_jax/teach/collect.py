"""Collecting a teacher's replies: what is missing is requested, and records and a summary are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqa_jax.data.sources import load_problems
from sqa_jax.data.teacher_records import write_records
from sqa_jax.errors import UserError
from sqa_jax.files import local_path, write_json
from sqa_jax.signals import StopSignal
from sqa_jax.teach.budget import Budget, Prices
from sqa_jax.teach.ledger import Ledger
from sqa_jax.teach.prompts import make_requests
from sqa_jax.teach.replies import ReplySet
from sqa_jax.teach.run import Progress, RemoteRunner, RunResult, run_local
from sqa_jax.teach.settings import REMOTE_CLIENTS, check_settings, make_teacher
from sqa_jax.teach.teacher import LocalTeacher, RemoteTeacher, Request

_BOUND = ("setting", "reply", "temperature", "image", "caption")  # of config.teach: a ledger has one value of each


def teach(config: Any, workdir: str) -> dict[str, Any]:
    """Requests the missing replies, writes records and summary, and returns the summary.

    Raises:
      UserError: the configuration, the data or the workdir is unusable (nothing was sent yet); or the budget is
        exhausted, or the service refuses or fails (everything that was paid is kept).
    """
    if not workdir:
        raise UserError("--workdir is needed: where the replies are kept")
    settings, root = config.teach, local_path(workdir, "a ledger of replies")
    check_settings(settings)
    problems = load_problems(config.data.source, config.data.path, config.data.splits, config.data.images)
    selected = problems.split(settings.split)[: settings.limit or None]
    prices = Prices(settings) if settings.client in REMOTE_CLIENTS else None
    limit = _spending_limit(settings, prices)
    teacher = make_teacher(config, problems)
    requests = make_requests(selected, settings, teacher.identity)

    with Ledger(root / "ledger.sqlite") as ledger:
        ledger.bind_settings(
            {"data.source": config.data.source, "teach.model": teacher.model, "replay": settings.client == "replay"}
            | {f"teach.{name}": settings[name] for name in _BOUND}
        )
        if ledger.open_batch_jobs() and not settings.batch:
            raise UserError(
                f"{root}: has batch jobs under way, which are paid for; collect them first: --config.teach.client=genai "
                "--config.teach.batch=True"
            )
        replies = ReplySet(ledger, problems, requests, teacher.model, settings)
        records = replies.records()
        missing = replies.missing(records)
        budget = Budget(limit, sum(ledger.spent()))
        print(_opening_line(teacher.model, settings, len(requests), missing, prices, limit), flush=True)
        with StopSignal() as stop, Progress(len(requests), len(requests) - len(missing), budget) as progress:
            result = _run(teacher, missing, ledger, budget, prices, settings, stop, progress, bool(records))
        records = replies.records()
        write_records(root / "records.jsonl", records)
        summary = replies.summary(records, result)
        write_json(root / "teach.json", summary)

    _report(summary, getattr(teacher, "other_splits", 0), settings, root)
    _raise_if_incomplete(result, summary, settings)
    return summary


def _spending_limit(settings: Any, prices: Prices | None) -> float:
    """US dollars that a workdir may spend in all; infinite for a teacher that is free of charge."""
    if prices is None or prices.free:
        return math.inf
    if settings.budget <= 0:
        raise UserError(
            f"config.teach.budget is {settings.budget:g}; {settings.model} costs money: set how many US dollars this "
            "workdir may spend in all, such as --config.teach.budget=5"
        )
    return settings.budget


def _run(
    teacher: RemoteTeacher | LocalTeacher, missing: Sequence[Request], ledger: Ledger, budget: Budget,
    prices: Prices | None, settings: Any, stop: StopSignal, progress: Progress, known_good: bool,
) -> RunResult:  # fmt: skip
    """Requests what is missing: from a local teacher, in batch jobs, or concurrently."""
    if not missing and not ledger.open_batch_jobs():
        return RunResult()
    if isinstance(teacher, LocalTeacher):
        return run_local(teacher, missing, ledger, stop, progress)
    assert prices is not None  # every remote client has prices
    if settings.batch:
        from sqa_jax.teach.batch import BatchRunner
        from sqa_jax.teach.genai import GenAI

        assert isinstance(teacher, GenAI)  # `check_settings`
        return BatchRunner(teacher, ledger, budget, prices, settings, stop, progress)(missing)
    return RemoteRunner(teacher, ledger, budget, prices, settings, stop, progress, known_good)(missing)


def _opening_line(
    model: str, settings: Any, requested: int, missing: Sequence[Request], prices: Prices | None, limit: float
) -> str:
    line = f"{model}, {settings.setting}: {requested - len(missing)} of {requested} replies are here"
    if missing and prices is not None and limit < math.inf:
        line += f"; the rest costs at most ${sum(map(prices.upper_bound, missing)):.4f}"
    return line


def _report(summary: dict[str, Any], other_splits: int, settings: Any, root: Path) -> None:
    """Prints the summary in a line, and where the records are."""
    status = ", ".join(f"{count} {name}" for name, count in summary["status"].items()) or "none"
    line = f"{summary['replies']} of {summary['asked_for']} replies: {status}"
    if (accuracy := summary["accuracy_of_answered"]) is not None:
        line += f"; {accuracy} % of {summary['answered']} answers are right"
    if summary["dollars"] or summary["dollars_perhaps"]:
        line += f"; ${summary['dollars']:.4f} spent"
    if summary["dollars_perhaps"]:
        line += f" (and perhaps ${summary['dollars_perhaps']:.4f} for lost ones)"
    if other_splits:
        line += f"; {other_splits} recorded replies are to other splits than {settings.split}"
    print(line)
    print(f"records are in {root}/records.jsonl")


def _raise_if_incomplete(result: RunResult, summary: dict[str, Any], settings: Any) -> None:
    """Raises `UserError` if replies are missing and the user can do something about it."""
    have = f"{summary['replies']} of {summary['asked_for']} replies are kept"
    again = "the same command asks only for what is missing"
    if result.ended == "budget":
        raise UserError(
            f"the budget of ${settings.budget:g} does not cover the next question; {have}: raise --config.teach.budget, {again}"
        )
    if result.ended == "refused":
        raise UserError(f"{settings.client}: {result.last_error}; {have}, {again}")
    if result.ended == "failing":
        raise UserError(f"{settings.client} keeps failing, last with {result.last_error}; {have}, {again}")
    if result.ended == "signal":
        print(f"stopped; {again}")
    elif result.failed:
        pid, message = next(iter(result.failed.items()))
        raise UserError(f"{len(result.failed)} questions got no reply, such as {pid}: {message}; {have}, {again}")
