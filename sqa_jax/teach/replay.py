"""A teacher that replays recorded replies."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import read_replies
from sqa_jax.errors import UserError
from sqa_jax.files import sha256_json
from sqa_jax.teach.teacher import Reply, Request


class Replay:
    """A `LocalTeacher`: the replies in `config.teach.replay` of `config.teach.model` and `config.teach.setting`.

    Attributes:
      other_splits: number of replies to questions of other splits than the chosen one.

    Args:
      config: the whole configuration.
      problems: the data.

    Raises:
      UserError: a file is missing or corrupt, replies to questions that are not in the data, or replies twice to a
        question; or there is no reply of this model, setting and split.
    """

    price: float | None = None

    def __init__(self, config: Any, problems: ProblemSet):
        settings = config.teach
        if not settings.replay:
            raise UserError("config.teach.replay is empty; name files of recorded replies (JSONL), or 'sample'")
        rows = [(path, row) for path in settings.replay for row in _read(path)]
        self.model = _choose_model(settings.model, sorted({row["model"] for _, row in rows}))
        wanted = [(p, row) for p, row in rows if (row["model"], row["setting"]) == (self.model, settings.setting)]
        if not wanted:
            available = ", ".join(sorted({f"{row['model']} {row['setting']}" for _, row in rows})) or "nothing"
            raise UserError(
                f"config.teach.replay: no reply of {self.model} in setting {settings.setting}; the files hold {available}"
            )
        known, split = problems.all(), {problem.pid for problem in problems.split(settings.split)}
        if unknown := [(path, row) for path, row in wanted if row["pid"] not in known]:
            path, row = unknown[0]
            raise UserError(
                f"{path}: {len(unknown)} replies are to questions that {problems.name} does not have, such as "
                f"{row['pid']}; name the data that they were recorded for, or remove them"
            )
        self.other_splits = sum(row["pid"] not in split for _, row in wanted)
        if self.other_splits == len(wanted):
            raise UserError(
                f"config.teach.replay: all {len(wanted)} replies of {self.model}, {settings.setting}, are to other splits than "
                f"{settings.split!r}; choose another --config.teach.split"
            )
        self._rows: dict[tuple[str, int], dict] = {}
        origins: dict[tuple[str, int], str] = {}
        for path, row in wanted:
            key = (row["pid"], row["sample"])
            if key in self._rows:
                raise UserError(
                    f"{path}: question {row['pid']} has a reply of {self.model} in {origins[key]} already; replay one of "
                    'the files at a time, or number the replies with "sample"'
                )
            self._rows[key], origins[key] = row, path
        self.identity: Mapping[str, Any] = {"recorded": sha256_json([row for _, row in wanted])}

    def ask_all(self, requests: Sequence[Request]) -> Generator[list[tuple[Request, Reply]], None, None]:
        """Yields all recorded replies in one chunk; questions without one are left out."""
        found = [(request, self._rows.get((request.pid, request.sample))) for request in requests]
        yield [(request, _reply(row)) for request, row in found if row is not None]


def _read(path: str) -> list[dict]:
    if path != "sample":
        return read_replies(path)
    from sqa_jax.data import sample

    return [{**row, "sample": 0} for row in sample.teacher_replies(sample.generate())]


def _choose_model(model: str, models: list[str]) -> str:
    if model in models:
        return model
    if not model and len(models) == 1:
        return models[0]
    given = "config.teach.model is empty" if not model else f"config.teach.model is {model!r}"
    raise UserError(f"{given}; the recorded replies are of {', '.join(models) or 'no model'}: choose one")


def _reply(row: dict) -> Reply:
    status = row["status"] if row.get("status") in ("cut_off", "blocked") else "ok"
    return Reply(status, row["raw"], row.get("prompt_tokens"), row.get("output_tokens"))
