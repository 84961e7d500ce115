"""Tokenized training rows, from one of two sources: a recipe applied to questions, or traces of tool dialogues."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sqa_jax.batches.config_data import config_records, encoder_for, training_problems
from sqa_jax.data.images import ImageStore
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import records_by_pid
from sqa_jax.prompts.encode import Encoded, Encoder
from sqa_jax.prompts.recipes import Example, Unusable, examples
from sqa_jax.prompts.tool_traces import read_traces, trace_rows

_QUESTIONS_PER_CALL = 1000  # tokenized in one call


class TrainingRow(NamedTuple):
    """A tokenized example.

    Attributes:
      pid: of the question.
      source: whose supervision the target is (`sqa_jax.prompts.recipes.SOURCES`); "call" or "answer" in a trace.
      encoded: prompt and target.
    """

    pid: str
    source: str
    encoded: Encoded


class RowSource(NamedTuple):
    """Where the rows of a dataset come from.

    Attributes:
      arm: its name in the manifest.
      questions: of the training split.
      rows: rows, and questions of which none can be made.
    """

    arm: str
    questions: Sequence[Problem]
    rows: Iterator[TrainingRow | Unusable]


def row_source(config, tokenizer: Any, problems: ProblemSet, images: ImageStore | None) -> RowSource:
    """The source that a configuration chooses: traces where `config.data.traces` names some, else its recipe.

    Args:
      images: of the training questions, for a vision-language model.
    """
    questions = training_problems(config, problems)
    if config.data.traces:
        return RowSource("tools", questions, _trace_rows(config, tokenizer, questions))
    rows = _recipe_rows(config, tokenizer, questions, problems, images)
    return RowSource(config.recipe.arm, questions, rows)


def _trace_rows(config, tokenizer: Any, questions: Sequence[Problem]) -> Iterator[TrainingRow | Unusable]:
    traces = read_traces(config.data.traces, {problem.pid: problem for problem in questions})
    yield from (Unusable(problem.pid, "no trace") for problem in questions if problem.pid not in traces)
    for problem, source, encoded in trace_rows(tokenizer, config.recipe, config.agent.context, questions, traces):
        yield TrainingRow(problem.pid, source, encoded)


def _recipe_rows(
    config, tokenizer: Any, questions: Sequence[Problem], problems: ProblemSet, images: ImageStore | None
) -> Iterator[TrainingRow | Unusable]:
    by_pid = records_by_pid(config_records(config, problems))
    encoder, recipe = encoder_for(config, tokenizer, images), config.recipe
    failed = {} if images is None else images.failed
    yield from (Unusable(problem.pid, failed[problem.pid]) for problem in questions if problem.pid in failed)
    usable = [problem for problem in questions if problem.pid not in failed]
    texts: set[str] = set()  # plain texts so far: many questions share a lecture, which is learned once
    for start in range(0, len(usable), _QUESTIONS_PER_CALL):
        part = usable[start : start + _QUESTIONS_PER_CALL]
        made = [item for problem in part for item in examples(problem, by_pid.get(problem.pid, {}), recipe)]
        yield from (item for item in made if isinstance(item, Unusable))
        yield from _encode(encoder, [item for item in made if isinstance(item, Example)], recipe.max_target, texts)


def _encode(encoder: Encoder, made: Sequence[Example], max_target: int, texts: set[str]) -> Iterator[TrainingRow]:
    """The row of each example with a prompt; a plain text that is not yet in `texts` in chunks of `max_target` tokens."""
    prompted, plain = [], {}
    for example in made:
        if example.format is not None:
            prompted.append((example, example.format))
        elif example.target not in texts:
            plain[example.target] = example
    texts.update(plain)
    encoded = encoder.encode(
        [example.problem for example, _ in prompted],
        [fmt for _, fmt in prompted],
        [example.target for example, _ in prompted],
    )
    for (example, _), row in zip(prompted, encoded, strict=True):
        yield TrainingRow(example.problem.pid, example.source, row)
    for example, chunks in zip(plain.values(), encoder.encode_texts(list(plain), max_target), strict=True):
        yield from (TrainingRow(example.problem.pid, example.source, chunk) for chunk in chunks)


@dataclasses.dataclass
class CollectedRows:
    """The rows that fit, and what was dropped or truncated.

    Attributes:
      rows: those that fit.
      dropped: {reason: pid of each row or question that is left out}.
      truncated: {part of the prompt: (pid, tokens cut off) of each row}.
    """

    rows: list[TrainingRow] = dataclasses.field(default_factory=list)
    dropped: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    truncated: dict[str, list[tuple[str, int]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )


def collect_rows(rows: Iterable[TrainingRow | Unusable], max_target: int) -> CollectedRows:
    """Keeps the rows whose prompt fits and whose target has at most `max_target` tokens; counts all others."""
    collected = CollectedRows()
    for row in rows:
        if isinstance(row, Unusable):
            collected.dropped[row.reason].append(row.pid)
        elif not row.encoded.fits:
            collected.dropped["question and choices longer than max_prompt"].append(row.pid)
        elif len(row.encoded.tokens) - row.encoded.prompt_length > max_target:
            collected.dropped["target longer than max_target"].append(row.pid)
        else:
            collected.rows.append(row)
            for part, count in row.encoded.truncated.items():
                collected.truncated[part].append((row.pid, count))
    return collected
