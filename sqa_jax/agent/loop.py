"""The loop: questions at different turns share one batch; a finished one makes way for the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sqa_jax.adapters import soft_prompt_tokens
from sqa_jax.agent.policies import Turn
from sqa_jax.agent.tools import Result, Tool, call_tools
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.inference.decode_slots import DecodeSlots
from sqa_jax.models.flops import forward_flops
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT
from sqa_jax.prompts.tool_dialogue import Call, Dialogue
from sqa_jax.runtime import Runtime


@dataclasses.dataclass
class Episode:
    """A question's conversation while it lasts.

    Attributes:
      unread: tokens that come next.
      asks: what the row was told last: a "decision" between calls and answer, an "answer", or a "text", which it is
        "writing" once it has begun.
      calls, turns: calls that were made; what was decided, with what was weighed for it and what a tool said.
      mistakes: what was wrong with texts that were neither an allowed call nor an answer.
      shortened: tokens that were left out, by part.
      read, branched, written, scored: tokens of the conversation that were read, of continuations that were read to
        weigh them, that the student wrote, and whose likelihood it gave.
      seen: keys that all of them saw, summed.
    """

    index: int
    problem: Problem
    unread: list[int]
    asks: str = ""
    last: int = 0
    calls: list[Call] = dataclasses.field(default_factory=list)
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    mistakes: list[str] = dataclasses.field(default_factory=list)
    shortened: dict[str, int] = dataclasses.field(default_factory=dict)
    length: int = 0
    read: int = 0
    branched: int = 0
    written: int = 0
    scored: int = 0
    seen: float = 0.0

    def count(self, tokens: int, options: Sequence[Sequence[int]] = ()) -> None:
        """Counts tokens that are read behind what is there, and continuations behind them."""
        self.seen += tokens * (self.length + (tokens + 1) / 2)
        self.length += tokens
        self.read += tokens
        for size in map(len, options):
            self.seen += (size - 1) * (self.length + size / 2)
            self.branched += size - 1
            self.scored += size


class Agent:
    """Answers questions with a student that may call tools.

    Args:
      config: the whole configuration; `config.agent` is what belongs to this.
      tools: by name.

    Raises:
      UserError: a setting is not usable.
    """

    def __init__(self, config, runtime: Runtime, tools: Mapping[str, Tool]):
        settings, student = config.agent, runtime.student
        if settings.context > student.config.max_positions:
            raise UserError(
                f"config.agent.context is {settings.context}, more than the student's {student.config.max_positions} "
                "positions; lower it"
            )
        if student.config.prefix_lm:
            raise UserError(
                f"{student.name} reads a prompt both ways, and so cannot hold a conversation with tools, which goes on behind "
                "what was read; choose another --config.student.path"
            )
        self._settings, self._student, self._tools = settings, student, dict(tools)
        self._virtual = soft_prompt_tokens(config.adapter)
        self.dialogue = Dialogue(student.tokenizer, config.recipe, [tool.spec for tool in tools.values()])
        self._conversations = DecodeSlots(
            config.adapter, runtime.decoder, runtime.mesh, settings.batch, settings.context, self.dialogue.ends,
            settings.max_new_tokens,
        )  # fmt: skip

    def __call__(self, policy: Any, adapter: Any, base: Any, problems: Sequence[Problem]) -> Iterator[dict[str, Any]]:
        """Yields a record for each question, as they end; `index` is its place in `problems`.

        Args:
          policy: of `sqa_jax.agent.policies`.

        Raises:
          UserError: a question with its choices alone is too long for `config.recipe.max_prompt` or
            `config.agent.context`.
        """
        if not problems:
            return
        self._policy = policy
        encoded = self.dialogue.openings(problems)
        self._answers = [self.dialogue.answers(problem) for problem in problems]
        for problem, one, answers in zip(problems, encoded, self._answers, strict=True):
            if not one.fits or len(one.tokens) + self._reserve(answers) > self._settings.context:
                raise UserError(
                    f"question {problem.pid}: question, choices and answer take {len(one.tokens)} + {self._reserve(answers)} "
                    "tokens, more than config.recipe.max_prompt or config.agent.context; raise them"
                )
        conversations = self._conversations
        virtual = self._virtual if "prompt" in adapter else NO_SOFT_PROMPT
        openings = conversations.start(adapter, base, [virtual.put(one.tokens) for one in encoded])
        coming, talks, due = iter(range(len(problems))), {}, set()
        while True:
            for row in set(range(conversations.rows)) - set(talks):
                if (index := next(coming, None)) is not None:
                    conversations.open(row)
                    talks[row] = Episode(
                        index, problems[index], openings[index], shortened=dict(encoded[index].shortened)
                    )
                    talks[row].count(conversations.begun)
                    due.add(row)
            if not talks:
                return
            ended: dict[int, int | None] = {}
            calls = {row: call for row in sorted(due) if (call := self._tell(row, talks[row])) is not None}
            due.clear()
            if not calls and conversations.waiting:
                for row, log_probs in conversations.step():
                    self._weighed(row, talks[row], log_probs, calls, ended)
            elif not calls:
                self._write(talks, calls, ended, due)
            due |= self._call(talks, calls)
            for row, answer in ended.items():
                yield self._record(talks.pop(row), answer)

    def _reserve(self, answers: Sequence[Sequence[int]]) -> int:
        """Places that weighing actions and answers takes, and writing."""
        return self.dialogue.reserve(answers) + self._settings.max_new_tokens * self._policy.writes

    def _room(self, row: int, talk: Episode) -> int:
        """Tokens of a tool's turn, call included, that the row has room for."""
        reserved = len(talk.unread) + self._reserve(self._answers[talk.index])
        return self._conversations.room(row) - self._conversations.begun - reserved

    def _legal(self, row: int, talk: Episode) -> list[str]:
        """Tools that may be called: each once, so many in all, and while there is room for what they say."""
        if len(talk.calls) >= self._settings.most_calls:
            return []
        called = {call.tool for call in talk.calls}
        legal = [name for name in self._tools if name not in called]
        sizes = [
            len(self.dialogue.call(self._tools[name].call_for(talk.problem))) + self.dialogue.around_result
            for name in legal
        ]
        return [name for name, size in zip(legal, sizes, strict=True) if size < self._room(row, talk)]

    def _tell(self, row: int, talk: Episode) -> Call | None:
        """Gives the row what to read and to weigh; or returns the call that a plan makes without asking."""
        tokens, answers = talk.unread, self._answers[talk.index]
        forced = len(talk.mistakes) > self._settings.most_mistakes
        legal = self._legal(row, talk)
        if self._policy.writes and not forced and self._room(row, talk) > 0:
            talk.asks, talk.last, tokens, options = "text", tokens[-1], tokens[:-1], []
        elif self._policy.weighs and legal:
            talk.asks, options = "decision", [*self.dialogue.heads(legal), *answers]
        elif (name := self._policy.next(Turn(talk.problem, _names(talk), tuple(legal), {}))) is not None:
            return self._tools[name].call_for(talk.problem)
        else:
            talk.asks, options = "answer", answers
        talk.unread = []
        if tokens:
            talk.count(len(tokens), options)
            self._conversations.tell(row, tokens, options)
        return None

    def _weighed(self, row: int, talk: Episode, log_probs: list[np.ndarray], calls: dict, ended: dict) -> None:
        """Decides by what was weighed."""
        if talk.asks == "text":
            return
        answers = [float(own.sum()) for own in log_probs[-len(talk.problem.choices) :]]
        turn: dict[str, Any] = {"answers": [round(value, 4) for value in answers]}
        tool = None
        if talk.asks == "decision":
            legal = self._legal(row, talk)
            *heads, answer = (float(own.sum()) for own in log_probs[: len(legal) + 1])
            margins = {name: head - answer for name, head in zip(legal, heads, strict=True)}
            turn["margins"] = {name: round(value, 4) for name, value in margins.items()}
            tool = self._policy.next(Turn(talk.problem, _names(talk), tuple(legal), margins))
        talk.turns.append(turn)
        if tool is None:
            ended[row] = int(np.argmax(answers))
        else:
            calls[row] = self._tools[tool].call_for(talk.problem)

    def _write(self, talks: Mapping[int, Episode], calls: dict, ended: dict, due: set) -> None:
        """Lets conversations write until a quarter of them have ended, and does what these say."""
        begun = {row: talk.last for row, talk in talks.items() if talk.asks == "text"}
        for row in begun:
            talks[row].asks = "writing"
        texts = self._conversations.write(begun, pause=3 * len(talks) // 4)
        for row, ids in texts.items():
            talk = talks[row]
            length = talk.length
            talk.count(1)
            talk.seen += len(ids) * (talk.length + len(ids) / 2)
            talk.written += len(ids) + 1
            text = self._student.tokenizer.decode(ids, skip_special_tokens=True)
            said = self.dialogue.read(text, talk.problem)
            if said.answer is not None:
                talk.turns.append({"said": text})
                ended[row] = said.answer
                continue
            count = self._tokens_of(ids, said.text)
            self._conversations.keep(row, ids, count)
            talk.length = length + 1 + count
            error = said.error
            if said.call is not None and said.call.tool not in self._legal(row, talk):
                error = f"{said.call.tool} cannot be called {'again' if said.call.tool in _names(talk) else 'any more'}"
            if not error:
                calls[row] = said.call
                talk.turns.append({"said": text})
                continue
            talk.mistakes.append(error)
            shown, _ = self.dialogue.result(self.dialogue.describe_error(error), max(0, self._room(row, talk)))
            talk.turns.append({"said": text, "error": error})
            talk.unread = shown
            due.add(row)

    def _tokens_of(self, ids: Sequence[int], text: str) -> int:
        """How many of the tokens it takes until `text` is written."""
        for count in range(len(ids)):
            if len(self._student.tokenizer.decode(ids[:count], skip_special_tokens=True)) >= len(text):
                return count
        return len(ids)

    def _call(self, talks: Mapping[int, Episode], calls: Mapping[int, Call]) -> set[int]:
        """Calls tools; the rows have their results to read."""
        asked = [(talks[row].problem, call) for row, call in calls.items()]
        results = call_tools(self._tools, asked, self._settings.tool_timeout)
        for (row, call), result in zip(calls.items(), results, strict=True):
            self._take(row, talks[row], call, result)
        return set(calls)

    def _take(self, row: int, talk: Episode, call: Call, result: Result) -> None:
        # What a student wrote is in its row already.
        talk.unread = talk.unread + ([] if self._policy.writes else self.dialogue.call(call))
        shown, left_out = self.dialogue.result(result.text, self._room(row, talk))
        talk.unread = talk.unread + shown
        talk.calls.append(call)
        if left_out:
            talk.shortened[call.tool] = left_out
        made = {"tool": call.tool, "argument": call.argument, "result": result.text, "status": result.status}
        talk.turns.append(made)

    def _record(self, talk: Episode, answer: int) -> dict[str, Any]:
        choices, tokens = talk.problem.choices, talk.read + talk.branched + talk.written
        flops = forward_flops(self._student.config, tokens, talk.seen / tokens, talk.scored + talk.written)
        forced = len(talk.mistakes) > self._settings.most_mistakes
        failed = any(turn.get("status") in ("failed", "timed out") for turn in talk.turns)
        return {
            "index": talk.index, "answer": answer, "text": choices[answer], "form": self.dialogue.form,
            "status": "forced" if forced else "tool failed" if failed else "ok",
            "calls": list(_names(talk)), "turns": talk.turns, "mistakes": talk.mistakes, "shortened": talk.shortened,
            "read": talk.read, "branched": talk.branched, "written": talk.written, "scored": talk.scored,
            "flops": flops,
        }  # fmt: skip


def _names(talk: Episode) -> tuple[str, ...]:
    return tuple(call.tool for call in talk.calls)
