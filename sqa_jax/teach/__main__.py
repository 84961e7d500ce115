"""Asks a teacher for reasoning, answer and solution of each question, and keeps every reply.

Reads:  the questions that config.data names, of config.teach.split; for a paid teacher its key from the
        environment (GEMINI_API_KEY, OPENAI_API_KEY, or the variable that config.teach.key_env names).
Writes: WORKDIR/ledger.sqlite, every attempt and reply, committed before it counts; WORKDIR/records.jsonl, the
        teacher records that config.data.teacher reads; WORKDIR/teach.json, a summary. The same command asks only
        for what is missing. Ctrl-C or SIGTERM stops when the replies under way are kept.

Examples:
  python -m sqa_jax.teach --config configs/teach.py --workdir runs/teach
  GEMINI_API_KEY=… python -m sqa_jax.teach --workdir runs/gemini --config.teach.client=gemini \\
      --config.teach.model=gemini-2.5-flash --config.teach.budget=5
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from absl import flags

from sqa_jax import cli
from sqa_jax.data.sources import ProblemSet, load_problems
from sqa_jax.data.teacher_records import STATUSES, TeacherRecord, make_records, write_records
from sqa_jax.errors import UserError
from sqa_jax.files import local_path, write_json
from sqa_jax.signals import StopSignal
from sqa_jax.teach.budget import Budget, Prices
from sqa_jax.teach.ledger import Ledger
from sqa_jax.teach.prompts import make_requests
from sqa_jax.teach.run import Progress, RemoteRun, Run, run_local
from sqa_jax.teach.teacher import Request

_REMOTE = ("gemini", "genai", "openai")


def teach(config, workdir: str) -> dict[str, Any]:
    """Asks for what is missing and writes records and summary; returns the summary.

    Raises:
      UserError: the configuration, the data or the workdir does not allow it (nothing was sent yet); or the
        budget is used up, or the service refuses or fails (everything that was paid is kept).
    """
    if not workdir:
        raise UserError("--workdir is needed: where the replies are kept")
    settings, root = config.teach, local_path(workdir, "a ledger of replies")
    _check(settings)
    data = config.data
    problems = load_problems(data.source, data.path, data.splits, data.images)
    chosen = problems.split(settings.split)[: settings.limit or None]
    remote = settings.client in _REMOTE
    prices = Prices(settings) if remote else None
    limit = math.inf if prices is None or prices.free else settings.budget
    if limit <= 0:
        raise UserError(
            f"config.teach.budget is {settings.budget:g}; {settings.model} costs money: set how many US dollars this "
            "workdir may spend in all, such as --config.teach.budget=5"
        )
    teacher = _teacher(config, problems)
    requests = make_requests(chosen, settings, teacher.identity)

    with Ledger(root / "ledger.sqlite") as ledger:
        names = ("setting", "reply", "temperature", "image", "caption")
        ledger.claim(
            {"data.source": data.source, "teach.model": teacher.model, "replay": settings.client == "replay"}
            | {f"teach.{name}": settings[name] for name in names}
        )
        if ledger.open_batches() and not settings.batch:
            raise UserError(
                f"{root}: has batch jobs under way, which are paid for; collect them first: --config.teach.client=genai "
                "--config.teach.batch=True"
            )
        records = _records(ledger, problems, requests, teacher.model, settings)
        missing = _missing(ledger, requests, records, settings)
        budget = Budget(limit, sum(ledger.spent()))
        print(
            f"{teacher.model}, {settings.setting}: {len(requests) - len(missing)} of {len(requests)} replies are here"
            + (
                f"; the rest costs at most ${sum(map(prices.most, missing)):.4f}"
                if missing and limit < math.inf
                else ""
            ),
            flush=True,
        )
        with StopSignal() as stop, Progress(len(requests), len(requests) - len(missing), budget) as progress:
            if not missing and not ledger.open_batches():
                run = Run()
            elif not remote:
                run = run_local(teacher, missing, ledger, stop, progress)
            elif settings.batch:
                from sqa_jax.teach.batch import BatchRun

                run = BatchRun(teacher, ledger, budget, prices, settings, stop, progress)(missing)
            else:
                run = RemoteRun(teacher, ledger, budget, prices, settings, stop, progress, bool(records))(missing)
        records = _records(ledger, problems, requests, teacher.model, settings)
        write_records(root / "records.jsonl", records)
        summary = _summary(ledger, problems, requests, records, run, teacher.model, settings)
        write_json(root / "teach.json", summary)

    outside = getattr(teacher, "outside", 0)
    print(
        _said(summary) + (f"; {outside} recorded replies are to other splits than {settings.split}" if outside else "")
    )
    print(f"records are in {root}/records.jsonl")
    _refuse_unfinished(run, summary, settings)
    return summary


def _check(settings) -> None:
    """Refuses settings that can only be mistakes."""

    def need(good: bool, name: str, what: str) -> None:
        if not good:
            raise UserError(f"config.teach.{name} is {settings[name]!r}; {what}")

    clients = (*_REMOTE, "student", "replay")
    need(settings.client in clients, "client", f"choose one of {', '.join(clients)}")
    need(settings.samples >= 1, "samples", "ask for at least one reply")
    need(
        settings.samples == 1 or settings.temperature > 0 or settings.client == "replay",
        "temperature", "several samples of a question would all be the same reply; set it above 0, or samples to 1",
    )  # fmt: skip
    for name in ("concurrency", "max_output_tokens", "ask_at_most", "batch_requests"):
        need(settings[name] >= 1, name, "it must be 1 or more")
    for name in ("limit", "retries", "requests_per_minute", "temperature", "backoff", "image_tokens", "budget"):
        need(settings[name] >= 0, name, "it must not be negative")
    for name in ("timeout", "poll_seconds"):
        need(settings[name] > 0, name, "it must be more than 0 seconds")
    need(0 < settings.batch_discount <= 1, "batch_discount", "it is a part of the usual price, such as 0.5")
    need(not settings.batch or settings.client == "genai", "batch", "only the client genai has batch jobs")
    repeatable = [status for status in STATUSES if status != "ok"]
    need(set(settings.ask_again) <= set(repeatable), "ask_again", f"choose of {', '.join(repeatable)}")


def _teacher(config, problems: ProblemSet):
    """The teacher that `config.teach.client` names; client libraries are only imported where they are used."""
    client = config.teach.client
    if client == "gemini":
        from sqa_jax.teach.gemini import Gemini

        return Gemini(config)
    if client == "genai":
        from sqa_jax.teach.genai import GenAI

        return GenAI(config)
    if client == "openai":
        from sqa_jax.teach.openai_compatible import OpenAICompatible

        return OpenAICompatible(config)
    if client == "student":
        from sqa_jax.teach.student import StudentTeacher

        return StudentTeacher(config)
    from sqa_jax.teach.replay import Replay

    return Replay(config, problems)


def _records(
    ledger: Ledger, problems: ProblemSet, requests: Sequence[Request], model: str, settings
) -> list[TeacherRecord]:
    """The records of all replies in the ledger, in the data's order; of a question that has changed, none."""
    known, asked = problems.all(), {(request.pid, request.sample): request.hash for request in requests}
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for row in ledger.replies():
        key = (row["pid"], row["sample"])
        if asked.get(key, row["hash"]) == row["hash"]:
            latest[key] = {**row, "model": model, "setting": settings.setting, "prompt_hash": row["hash"]}
    place = {pid: number for number, pid in enumerate(known)}
    rows = sorted((row for row in latest.values() if row["pid"] in place), key=lambda r: (place[r["pid"]], r["sample"]))
    return make_records(rows, known)


def _missing(ledger: Ledger, requests: Sequence[Request], records: Sequence[TeacherRecord], settings) -> list[Request]:
    """The requests without a reply, and those whose reply is to be asked for again."""
    times = {row["hash"]: row["times"] for row in ledger.replies()}
    again = {
        record.prompt_hash
        for record in records
        if record.status in settings.ask_again and times[record.prompt_hash] < settings.ask_at_most
    }
    return [request for request in requests if request.hash not in times or request.hash in again]


def _summary(
    ledger: Ledger, problems: ProblemSet, requests: Sequence[Request], records: Sequence[TeacherRecord], run: Run, model: str, settings
) -> dict[str, Any]:  # fmt: skip
    known, asked = problems.all(), {request.hash for request in requests}
    own = [record for record in records if record.prompt_hash in asked]
    answered = [record for record in own if record.answer is not None]
    right = sum(record.answer == known[record.pid].answer for record in answered)
    paid, maybe = ledger.spent()
    return {
        "model": model,
        "setting": settings.setting,
        "split": settings.split,
        "asked_for": len(requests),
        "replies": len(own),
        "missing": len(requests) - len(own),
        "status": {name: count for name in STATUSES if (count := sum(r.status == name for r in own))},
        "answered": len(answered),
        "accuracy_of_answered": round(100 * right / len(answered), 2) if answered else None,
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in own),
        "output_tokens": sum(record.output_tokens or 0 for record in own),
        "dollars": round(paid, 6),
        "dollars_perhaps": round(maybe, 6),  # for attempts that were sent and brought no reply
        "ended": run.ended or ("missing" if len(own) < len(requests) else "done"),
        "failed": dict(list(run.failed.items())[:20]),
    }


def _said(summary: dict[str, Any]) -> str:
    status = ", ".join(f"{count} {name}" for name, count in summary["status"].items()) or "none"
    accuracy = summary["accuracy_of_answered"]
    right = f"; {accuracy} % of {summary['answered']} answers are right" if accuracy is not None else ""
    perhaps = f" (and perhaps ${summary['dollars_perhaps']:.4f} for lost ones)" if summary["dollars_perhaps"] else ""
    money = f"; ${summary['dollars']:.4f} spent{perhaps}" if summary["dollars"] or perhaps else ""
    return f"{summary['replies']} of {summary['asked_for']} replies: {status}{right}{money}"


def _refuse_unfinished(run: Run, summary: dict[str, Any], settings) -> None:
    """Raises where replies are missing and the user can do something about it."""
    have = f"{summary['replies']} of {summary['asked_for']} replies are kept"
    again = "the same command asks only for what is missing"
    if run.ended == "budget":
        raise UserError(
            f"the budget of ${settings.budget:g} does not cover the next question; {have}: raise --config.teach.budget, {again}"
        )
    if run.ended == "refused":
        raise UserError(f"{settings.client}: {run.said}; {have}, {again}")
    if run.ended == "failing":
        raise UserError(f"{settings.client} keeps failing, last with {run.said}; {have}, {again}")
    if run.ended == "signal":
        print(f"stopped; {again}")
    elif run.failed:
        pid, said = next(iter(run.failed.items()))
        raise UserError(f"{len(run.failed)} questions got no reply, such as {pid}: {said}; {have}, {again}")


def main() -> None:
    teach(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.define_config("configs/teach.py")
    cli.run(main)
