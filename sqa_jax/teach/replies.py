"""The replies in a ledger: as teacher records, as what is missing, and as a summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import STATUSES, TeacherRecord, make_records
from sqa_jax.teach.ledger import Ledger
from sqa_jax.teach.run import RunResult
from sqa_jax.teach.teacher import Request


@dataclasses.dataclass(frozen=True)
class ReplySet:
    """The replies in a ledger to the requests of a run.

    Attributes:
      model: the teacher's name.
      settings: `config.teach`.
    """

    ledger: Ledger
    problems: ProblemSet
    requests: Sequence[Request]
    model: str
    settings: Any

    def records(self) -> list[TeacherRecord]:
        """Records of all replies in the ledger, in the data's order; none for a question that has changed."""
        known = self.problems.all()
        hash_of = {(request.pid, request.sample): request.hash for request in self.requests}
        latest: dict[tuple[str, int], dict[str, Any]] = {}
        for row in self.ledger.replies():
            key = (row["pid"], row["sample"])
            if hash_of.get(key, row["hash"]) == row["hash"]:
                latest[key] = {
                    **row, "model": self.model, "setting": self.settings.setting, "prompt_hash": row["hash"],
                }  # fmt: skip
        position = {pid: index for index, pid in enumerate(known)}
        rows = [row for row in latest.values() if row["pid"] in position]
        return make_records(sorted(rows, key=lambda row: (position[row["pid"]], row["sample"])), known)

    def missing(self, records: Sequence[TeacherRecord]) -> list[Request]:
        """Requests without a reply, and those to repeat because of their reply's status."""
        times = {row["hash"]: row["times"] for row in self.ledger.replies()}
        repeated = {
            record.prompt_hash
            for record in records
            if record.status in self.settings.ask_again and times[record.prompt_hash] < self.settings.ask_at_most
        }
        return [request for request in self.requests if request.hash not in times or request.hash in repeated]

    def summary(self, records: Sequence[TeacherRecord], result: RunResult) -> dict[str, Any]:
        """The content of WORKDIR/teach.json."""
        known, hashes = self.problems.all(), {request.hash for request in self.requests}
        replies = [record for record in records if record.prompt_hash in hashes]
        answered = [record for record in replies if record.answer is not None]
        right = sum(record.answer == known[record.pid].answer for record in answered)
        paid, maybe_paid = self.ledger.spent()
        count = {name: sum(record.status == name for record in replies) for name in STATUSES}
        return {
            "model": self.model,
            "setting": self.settings.setting,
            "split": self.settings.split,
            "asked_for": len(self.requests),
            "replies": len(replies),
            "missing": len(self.requests) - len(replies),
            "status": {name: number for name, number in count.items() if number},
            "answered": len(answered),
            "accuracy_of_answered": round(100 * right / len(answered), 2) if answered else None,
            "prompt_tokens": sum(record.prompt_tokens or 0 for record in replies),
            "output_tokens": sum(record.output_tokens or 0 for record in replies),
            "dollars": round(paid, 6),
            "dollars_perhaps": round(maybe_paid, 6),  # attempts that were sent and got no reply
            "ended": result.ended or ("missing" if len(replies) < len(self.requests) else "done"),
            "failed": dict(list(result.failed.items())[:20]),
        }
