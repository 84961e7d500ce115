"""A teacher's replies to questions: the raw text, and the answer, reasoning and solution parsed from it."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.data.answers import Numbering, parse_answer
from sqa_jax.data.problem import Problem
from sqa_jax.data.reasoning import chain_of_thought
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_write, read_jsonl

KINDS = ("solution", "reasoning")
STATUSES = ("ok", "empty", "malformed", "unparsed", "cut_off", "blocked")
_FIELD = r'"(?:%s)"\s*:\s*"((?:[^"\\]|\\.)*)'
_SOLUTION = re.compile(_FIELD % "solution|explanation", re.IGNORECASE)
_REASONING = re.compile(_FIELD % "reasoning", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class TeacherRecord:
    """One reply of a teacher to one question.

    Attributes:
      setting: parts of the prompt: QTCH, QTCHL, QTCHLS or QTCHS.
      raw: the reply, verbatim.
      answer: index of the option that it chooses, or None.
      reasoning: the chain of thought towards the answer: free text without its verdict, or that field of a JSON reply.
      solution: the explanation of the answer: that field of a JSON reply, "" for free text.
      status: "ok"; "empty"; "malformed" (neither text nor valid JSON); "unparsed" (no option is chosen);
        "cut_off" and "blocked" as the teacher's service reported.
      price: US dollars, None where unknown.
      sample: number of the reply among several samples for one prompt, from 0.
    """

    pid: str
    model: str
    setting: str
    raw: str
    answer: int | None = None
    reasoning: str = ""
    solution: str = ""
    status: str = "ok"
    prompt_hash: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    price: float | None = None
    sample: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of `KINDS` that it has: "solution" is an explanation field, "reasoning" a chain of thought."""
        return tuple(kind for kind in KINDS if getattr(self, kind))


def parse_reply(raw: str, problem: Problem, numbering: Numbering) -> tuple[int | None, str, str, str]:
    """Parses (answer, reasoning, solution, status) from a reply: free text or JSON, complete or cut off."""
    text = raw.strip()
    if not text:
        return None, "", "", "empty"
    answer = parse_answer(text, problem.choices, numbering=numbering)
    if '"answer"' in text or text.startswith(("{", "```json")):
        found = {name: pattern.search(text) for name, pattern in (("r", _REASONING), ("s", _SOLUTION))}
        texts = {name: _unescape(match[1]) if match else "" for name, match in found.items()}
        status = "malformed" if not any(found.values()) else "unparsed" if answer is None else "ok"
        return answer, texts["r"], texts["s"], status
    return answer, chain_of_thought(text), "", "unparsed" if answer is None else "ok"


def _unescape(text: str) -> str:
    try:
        return json.loads(f'"{text}"', strict=False).strip()
    except json.JSONDecodeError:
        return text.replace("\\n", "\n").replace('\\"', '"').strip()


def make_records(rows: Iterable[Mapping], problems: Mapping[str, Problem]) -> list[TeacherRecord]:
    """Records of replies {pid, model, setting, raw}; replies to unknown questions are left out."""
    rows = [row for row in rows if row["pid"] in problems]
    numberings = _numberings(rows, problems)
    records = []
    for row in rows:
        problem = problems[row["pid"]]
        answer, reasoning, solution, status = parse_reply(row["raw"], problem, numberings[row["model"], row["setting"]])
        usage = {
            key: row[key]
            for key in ("prompt_hash", "prompt_tokens", "output_tokens", "price", "sample")
            if row.get(key) is not None
        }
        if row.get("status") in ("cut_off", "blocked"):
            status = row["status"]
        records.append(
            TeacherRecord(
                pid=row["pid"], model=row["model"], setting=row["setting"], raw=row["raw"],
                answer=answer, reasoning=reasoning, solution=solution, status=status, **usage,
            )
        )  # fmt: skip
    return records


def _numberings(rows: Sequence[Mapping], problems: Mapping[str, Problem]) -> dict[tuple[str, str], Numbering]:
    """How each (model, setting) numbers options, by the replies that give a number *and* the option's text."""
    votes: dict[tuple[str, str], dict[Numbering, int]] = {}
    for row in rows:
        vote = votes.setdefault((row["model"], row["setting"]), {"letters": 0, "zero": 0, "one": 0})
        choices = problems[row["pid"]].choices
        for mark, text in re.findall(r"\(([A-J]|\d)\)[\s:*]*([^\n*()]+)", row["raw"]):
            index = next(
                (k for k, c in enumerate(choices) if text.strip().lower().startswith(c.lower().rstrip("."))), None
            )
            if index is None:
                continue
            if mark.isalpha():
                vote["letters"] += 1
            else:
                vote["zero"] += int(mark) == index
                vote["one"] += int(mark) == index + 1
    # Replies that are only JSON give no vote; the benchmark's own prompts number from 0.
    return {key: max(("zero", "letters", "one"), key=lambda n: vote[n]) for key, vote in votes.items()}


def load_records(paths: Sequence[str | Path], problems: Mapping[str, Problem]) -> list[TeacherRecord]:
    """Loads files of replies or of full records (JSONL); a full record is parsed again from its raw reply.

    Raises:
      UserError: a file is missing, a line lacks a field, or a file holds two replies for one question (the line is
        named); or no reply of a file is for a known question.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        replies = read_replies(path)
        if replies and not any(row["pid"] in problems for row in replies):
            raise UserError(
                f"{path}: its {len(replies)} replies are for questions that are not in the data (first {replies[0]['pid']}); "
                "check config.data.path and config.data.teacher"
            )
        rows += replies
    return make_records(rows, problems)


def read_replies(path: str | Path) -> list[dict[str, Any]]:
    """The checked rows {pid, model, setting, raw, …} of one file of replies or of full records.

    One file holds one reply for each (pid, model, setting, sample). Several files may hold more: replies of one model
    in JSON and in free text.

    Raises:
      UserError: as `load_records`.
    """
    rows: list[dict[str, Any]] = []
    first_of: dict[tuple, int] = {}
    for number, row in enumerate(read_jsonl(path, "teacher replies"), start=1):
        row = {**row, "pid": str(row.get("pid", "")), "sample": row.get("sample", 0)}
        for key in ("pid", "model", "setting", "raw"):
            if not isinstance(row.get(key), str) or (key == "pid" and not row[key]):
                raise UserError(
                    f"{path}: reply {number} has no text in {key!r}; each line needs pid, model, setting and raw"
                )
        if isinstance(row["sample"], bool) or not isinstance(row["sample"], int) or row["sample"] < 0:
            raise UserError(f"{path}: reply {number}: sample {row['sample']!r} is not a number from 0")
        first = first_of.setdefault((row["pid"], row["model"], row["setting"], row["sample"]), number)
        if first != number:
            raise UserError(
                f"{path}: replies {first} and {number} are both for question {row['pid']} ({row['model']}, "
                f'{row["setting"]}); remove one, or number them with "sample"'
            )
        rows.append(row)
    return rows


def records_by_pid(records: Iterable[TeacherRecord]) -> dict[str, dict[str, list[TeacherRecord]]]:
    """{pid: {kind: records}}, in the order they were recorded."""
    by_pid: dict[str, dict[str, list[TeacherRecord]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in records:
        # A reply without content still says, with its status, why there is no example.
        for kind in record.kinds or KINDS:
            by_pid[record.pid][kind].append(record)
    return by_pid


def write_records(path: str | Path, records: Iterable[TeacherRecord]) -> None:
    """Writes records as JSONL, atomically."""
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
