"""The agent loop: episodes at different turns share one batch of decode slots; a finished one frees its slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sqa_jax.adapters.adapter import soft_prompt_tokens
from sqa_jax.agent.episode import Episode
from sqa_jax.agent.policies import Policy, Turn
from sqa_jax.agent.tools import Result, Tool, call_tools
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.inference.decode_slots import DecodeSlots
from sqa_jax.models.flops import forward_flops
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT
from sqa_jax.prompts.tool_calls import Call
from sqa_jax.prompts.tool_dialogue import Dialogue
from sqa_jax.runtime import Runtime


class Agent:
    """Answers questions with a student that may call tools.

    Args:
      config: the whole configuration; `config.agent` holds the agent's settings.
      tools: by name.

    Attributes:
      dialogue: renders and parses the turns.
      slots: the multi-turn decoder.

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
                f"{student.name} is a prefix LM: it attends to its whole prompt bidirectionally, so a dialogue with "
                "tools cannot be appended to what was prefilled; choose another --config.student.path"
            )
        self.settings, self.student, self.tools = settings, student, dict(tools)
        self.soft_prompt = soft_prompt_tokens(config.adapter)
        self.dialogue = Dialogue(student.tokenizer, config.recipe, [tool.spec for tool in tools.values()])
        self.slots = DecodeSlots(
            config.adapter, runtime.decoder, runtime.mesh, settings.batch, settings.context, self.dialogue.stop_tokens,
            settings.max_new_tokens,
        )  # fmt: skip

    def __call__(
        self, policy: Policy, adapter: ParamTree, base: ParamTree, problems: Sequence[Problem]
    ) -> Iterator[dict[str, Any]]:
        """Yields a row for each question, as episodes end; "index" is its position in `problems`.

        Raises:
          UserError: a question with its choices alone is too long for `config.recipe.max_prompt` or
            `config.agent.context`.
        """
        if problems:
            yield from _Rollout(self, policy, adapter, base, problems).run()


class _Rollout:
    """One run of a policy over questions."""

    def __init__(self, agent: Agent, policy: Policy, adapter: ParamTree, base: ParamTree, problems: Sequence[Problem]):
        self._settings, self._student, self._tools = agent.settings, agent.student, agent.tools
        self._dialogue, self._slots, self._policy, self._problems = agent.dialogue, agent.slots, policy, problems
        self._openings = self._dialogue.encode_questions(problems)
        self._answers = [self._dialogue.encode_answers(problem) for problem in problems]
        for problem, opening, answers in zip(problems, self._openings, self._answers, strict=True):
            reserved = self._reserved(answers)
            if not opening.fits or len(opening.tokens) + reserved > self._settings.context:
                raise UserError(
                    f"question {problem.pid}: question, choices and answer take {len(opening.tokens)} + {reserved} "
                    "tokens, more than config.recipe.max_prompt or config.agent.context; raise them"
                )
        soft_prompt = agent.soft_prompt if "prompt" in adapter else NO_SOFT_PROMPT
        prompts = [soft_prompt.put(opening.tokens) for opening in self._openings]
        self._prompts = self._slots.start(adapter, base, prompts)
        self._next_index = iter(range(len(problems)))
        self._episodes: dict[int, Episode] = {}  # by slot
        self._due: set[int] = set()  # slots whose next request is to be made
        self._calls: dict[int, Call] = {}  # that are to be executed
        self._answered: dict[int, int] = {}  # options that ended episodes

    def run(self) -> Iterator[dict[str, Any]]:
        """Yields a row for each question."""
        while True:
            self._fill_slots()
            if not self._episodes:
                return
            for slot in sorted(self._due):
                if (call := self._request(slot, self._episodes[slot])) is not None:
                    self._calls[slot] = call
            self._due.clear()
            if not self._calls and self._slots.pending:
                for slot, log_probs in self._slots.prefill_step():
                    self._decide(slot, self._episodes[slot], log_probs)
            elif not self._calls:
                self._decode()
            self._execute_calls()
            for slot, answer in self._answered.items():
                yield self._row(self._episodes.pop(slot), answer)
            self._answered = {}

    def _fill_slots(self) -> None:
        """Starts episodes in free slots."""
        for slot in set(range(self._slots.num_slots)) - set(self._episodes):
            if (index := next(self._next_index, None)) is not None:
                self._slots.reset(slot)
                truncated = dict(self._openings[index].truncated)
                episode = Episode(index, self._problems[index], self._prompts[index], truncated=truncated)
                episode.count_prefill(self._slots.shared_prefix_length)
                self._episodes[slot] = episode
                self._due.add(slot)

    def _reserved(self, answers: Sequence[Sequence[int]]) -> int:
        """Tokens of the context kept free for scoring actions and answers, and for generating."""
        return self._dialogue.scoring_tokens(answers) + self._settings.max_new_tokens * self._policy.generates

    def _tokens_for_tool(self, slot: int, episode: Episode) -> int:
        """Tokens that a tool's turn may take, call included."""
        reserved = len(episode.pending) + self._reserved(self._answers[episode.index])
        return self._slots.remaining_tokens(slot) - self._slots.shared_prefix_length - reserved

    def _legal_tools(self, slot: int, episode: Episode) -> list[str]:
        """Tools that may be called: each once, at most `most_calls` in all, and while their turn fits the context."""
        if len(episode.calls) >= self._settings.most_calls:
            return []
        names = [name for name in self._tools if name not in episode.called]
        sizes = [
            len(self._dialogue.encode_call(self._tools[name].call_for(episode.problem)))
            + self._dialogue.result_overhead
            for name in names
        ]
        return [name for name, size in zip(names, sizes, strict=True) if size < self._tokens_for_tool(slot, episode)]

    def _is_forced(self, episode: Episode) -> bool:
        """Whether the student has made so many mistakes that it has to answer."""
        return len(episode.mistakes) > self._settings.most_mistakes

    def _request(self, slot: int, episode: Episode) -> Call | None:
        """Enqueues what the slot prefills and scores next; or returns the call that a plan makes without asking."""
        tokens, answers = episode.pending, self._answers[episode.index]
        legal = self._legal_tools(slot, episode)
        options: list[list[int]] = []
        if self._policy.generates and not self._is_forced(episode) and self._tokens_for_tool(slot, episode) > 0:
            episode.request, episode.first_token, tokens = "text", tokens[-1], tokens[:-1]
        elif self._policy.scores and legal:
            episode.request, options = "decision", [*self._dialogue.action_prefixes(legal), *answers]
        elif (name := self._policy.next(Turn(episode.problem, episode.called, tuple(legal), {}))) is not None:
            return self._tools[name].call_for(episode.problem)
        else:
            episode.request, options = "answer", answers
        episode.pending = []
        if tokens:
            episode.count_prefill(len(tokens), options)
            self._slots.enqueue(slot, tokens, options)
        return None

    def _decide(self, slot: int, episode: Episode, log_probs: list[np.ndarray]) -> None:
        """Calls a tool or answers, by the options' log-likelihood."""
        if episode.request == "text":
            return
        answers = [float(option.sum()) for option in log_probs[-len(episode.problem.choices) :]]
        turn: dict[str, Any] = {"answers": [round(value, 4) for value in answers]}
        tool = None
        if episode.request == "decision":
            legal = self._legal_tools(slot, episode)
            *heads, answer = (float(option.sum()) for option in log_probs[: len(legal) + 1])
            margins = {name: head - answer for name, head in zip(legal, heads, strict=True)}
            turn["margins"] = {name: round(value, 4) for name, value in margins.items()}
            tool = self._policy.next(Turn(episode.problem, episode.called, tuple(legal), margins))
        episode.turns.append(turn)
        if tool is None:
            self._answered[slot] = int(np.argmax(answers))
        else:
            self._calls[slot] = self._tools[tool].call_for(episode.problem)

    def _decode(self) -> None:
        """Generates until a quarter of the episodes have ended their text, and acts on these texts."""
        started = {slot: episode.first_token for slot, episode in self._episodes.items() if episode.request == "text"}
        for slot in started:
            self._episodes[slot].request = "decoding"
        texts = self._slots.decode(started, pause_at=3 * len(self._episodes) // 4)
        for slot, ids in texts.items():
            self._act_on_text(slot, self._episodes[slot], ids)

    def _act_on_text(self, slot: int, episode: Episode, ids: list[int]) -> None:
        """Parses a generated text into an answer, a call or a mistake."""
        length = episode.length
        episode.count_generated(len(ids))
        text = self._student.tokenizer.decode(ids, skip_special_tokens=True)
        said = self._dialogue.parse(text, episode.problem)
        if said.answer is not None:
            episode.turns.append({"said": text})
            self._answered[slot] = said.answer
            return
        kept = self._num_tokens_of(ids, said.text)
        self._slots.truncate(slot, ids, kept)
        episode.length = length + 1 + kept
        error = said.error
        if said.call is not None and said.call.tool not in self._legal_tools(slot, episode):
            error = f"{said.call.tool} cannot be called {'again' if said.call.tool in episode.called else 'any more'}"
        if said.call is not None and not error:
            self._calls[slot] = said.call
            episode.turns.append({"said": text})
            return
        episode.mistakes.append(error)
        limit = max(0, self._tokens_for_tool(slot, episode))
        episode.pending, _ = self._dialogue.encode_result(self._dialogue.describe_error(error), limit)
        episode.turns.append({"said": text, "error": error})
        self._due.add(slot)

    def _num_tokens_of(self, ids: Sequence[int], text: str) -> int:
        """How many of the generated tokens it takes to render `text`."""
        for count in range(len(ids)):
            if len(self._student.tokenizer.decode(ids[:count], skip_special_tokens=True)) >= len(text):
                return count
        return len(ids)

    def _execute_calls(self) -> None:
        """Executes the calls of all episodes together, and appends their results."""
        requests = [(self._episodes[slot].problem, call) for slot, call in self._calls.items()]
        results = call_tools(self._tools, requests, self._settings.tool_timeout)
        for (slot, call), result in zip(self._calls.items(), results, strict=True):
            self._append_result(slot, self._episodes[slot], call, result)
        self._due |= set(self._calls)
        self._calls = {}

    def _append_result(self, slot: int, episode: Episode, call: Call, result: Result) -> None:
        # A call that the student generated is in the cache already.
        episode.pending = episode.pending + ([] if self._policy.generates else self._dialogue.encode_call(call))
        shown, left_out = self._dialogue.encode_result(result.text, self._tokens_for_tool(slot, episode))
        episode.pending = episode.pending + shown
        episode.calls.append(call)
        if left_out:
            episode.truncated[call.tool] = left_out
        turn = {"tool": call.tool, "argument": call.argument, "result": result.text, "status": result.status}
        episode.turns.append(turn)

    def _row(self, episode: Episode, answer: int) -> dict[str, Any]:
        """The row of predictions.jsonl."""
        tokens = episode.prompt_tokens + episode.branch_tokens + episode.generated_tokens
        logits = episode.scored_tokens + episode.generated_tokens
        failed = any(turn.get("status") in ("failed", "timed out") for turn in episode.turns)
        return {
            "index": episode.index, "answer": answer, "text": episode.problem.choices[answer],
            "form": self._dialogue.form,
            "status": "forced" if self._is_forced(episode) else "tool failed" if failed else "ok",
            "calls": list(episode.called), "turns": episode.turns, "mistakes": episode.mistakes,
            "shortened": episode.truncated, "read": episode.prompt_tokens, "branched": episode.branch_tokens,
            "written": episode.generated_tokens, "scored": episode.scored_tokens,
            "flops": forward_flops(self._student.config, tokens, episode.attended_keys / tokens, logits),
        }  # fmt: skip
