"""From questions to predictions: by the options' likelihood, by generated text that is parsed, or by both in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqa_jax.adapters import soft_prompt_tokens
from sqa_jax.batches.dataset import encoder_for
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.data.answers import parse_answer
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.inference.generate import Generator
from sqa_jax.inference.likelihood import Choice, LikelihoodScorer, choose, layout
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT, SoftPromptTokens
from sqa_jax.parallel.mesh import check_rows
from sqa_jax.prompts.formats import ANSWER_IS, option_targets
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.runtime import Runtime


class Prediction(NamedTuple):
    """The answer to one question.

    Attributes:
      index: of the question, among those that were asked.
      answer: index of the chosen option, or None where the text chooses none.
      text: what says so.
      read, written, scored: tokens that the student read (prompt and options), that it generated, and whose
        likelihood it gave.
    """

    index: int
    answer: int | None
    text: str
    read: int
    written: int
    scored: int


class LikelihoodAnswerer:
    """Answers with the option whose answer sentence the student finds likeliest.

    Raises:
      UserError: a setting is not known.
    """

    def __init__(self, config, runtime: Runtime, pictures: ImageBatcher | None = None):
        settings = config.eval
        if settings.normalize not in ("none", "length"):
            raise UserError(f"config.eval.normalize is {settings.normalize!r}; choose none or length")
        check_rows(settings.batch_rows, runtime.mesh, "eval.batch_rows")
        self._virtual = soft_prompt_tokens(config.adapter)
        self._normalize, self._style = settings.normalize, config.recipe.answer
        self._format = arm_format(config.recipe)
        self._encoder = encoder_for(config, runtime.student.tokenizer, pictures and pictures.pictures)
        self._scorer = LikelihoodScorer(
            config.adapter, runtime.decoder, runtime.mesh, settings.row_length, settings.batch_rows, pictures
        )

    def __call__(
        self, adapter: Any, base: Any, problems: Sequence[Problem], reasons: Sequence[str] | None = None
    ) -> Iterator[Prediction]:
        prompts = _prompts(
            self._encoder, self._format, problems, self._virtual if "prompt" in adapter else NO_SOFT_PROMPT
        )
        reasons = reasons or [""] * len(problems)
        sentences = [option_targets(*one, self._style) for one in zip(problems, reasons, strict=True)]
        ids = iter(self._encoder.plain([s for own in sentences for s in own]))
        choices = [Choice(prompt, [next(ids) for _ in own]) for prompt, own in zip(prompts, sentences, strict=True)]
        for index, log_probs in self._scorer(adapter, base, choices):
            answer = choose(log_probs, self._normalize)
            tree = layout(choices[index])
            yield Prediction(index, answer, sentences[index][answer], len(tree.tokens), 0, len(tree.targets))


class GenerativeAnswerer:
    """Answers with what the student writes, read as any reply is read."""

    def __init__(self, config, runtime: Runtime, pictures: ImageBatcher | None = None):
        settings, student = config.eval, runtime.student
        self._format, self._tokenizer = arm_format(config.recipe), student.tokenizer
        self._virtual = soft_prompt_tokens(config.adapter)
        self._encoder = encoder_for(config, student.tokenizer, pictures and pictures.pictures)
        self._generator = Generator(
            config.adapter, runtime.decoder, runtime.mesh, student.eos_ids, settings.max_new_tokens,
            settings.batch_questions, settings.temperature, config.seed, pictures,
        )  # fmt: skip

    def __call__(self, adapter: Any, base: Any, problems: Sequence[Problem]) -> Iterator[Prediction]:
        prompts = _prompts(
            self._encoder, self._format, problems, self._virtual if "prompt" in adapter else NO_SOFT_PROMPT
        )
        for index, ids in self._generator(adapter, base, prompts):
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            answer = parse_answer(text, problems[index].choices)
            yield Prediction(index, answer, text, len(prompts[index]), len(ids) + 1, 0)


class ReasoningAnswerer:
    """Generates the reasoning, then answers with the option that is likeliest behind it: no answer is unparsed.

    What is scored is the whole target, as training tokenizes it: reasoning, line end, answer sentence. Reasoning
    that `config.eval.max_new_tokens` cuts off is judged as far as it came.
    """

    def __init__(self, config, runtime: Runtime, pictures: ImageBatcher | None = None):
        settings = config.eval
        self._generated, self._chosen = (
            GenerativeAnswerer(config, runtime, pictures),
            LikelihoodAnswerer(config, runtime, pictures),
        )
        self._at_once = (
            4 * settings.batch_questions
        )  # texts that are judged together, and at most lost when interrupted

    def __call__(self, adapter: Any, base: Any, problems: Sequence[Problem]) -> Iterator[Prediction]:
        generated = self._generated(adapter, base, problems)
        while part := list(itertools.islice(generated, self._at_once)):
            reasons = [_before_answer(one.text) for one in part]
            for one in self._chosen(adapter, base, [problems[text.index] for text in part], reasons):
                text = part[one.index]
                yield one._replace(index=text.index, read=text.read + one.read, written=text.written)


def _before_answer(text: str) -> str:
    """A generated text up to its last answer sentence, or all of it where it has none."""
    reason = text[: text.rfind(ANSWER_IS)] if ANSWER_IS in text else text
    return reason.strip()


_WAYS = {"likelihood": LikelihoodAnswerer, "reason": ReasoningAnswerer, "generate": GenerativeAnswerer}


def answer_mode(config) -> str:
    """What `config.eval.mode` means for the recipe's format; "auto" is what the format calls for.

    Raises:
      UserError: the mode is not known, or the format does not allow it.
    """
    mode, fmt = config.eval.mode, arm_format(config.recipe)
    if mode == "auto":
        return "likelihood" if fmt.answer_first else "reason"
    if mode not in _WAYS:
        raise UserError(f"config.eval.mode is {mode!r}; choose one of auto, {', '.join(_WAYS)}")
    if mode != "generate" and fmt.answer_first != (mode == "likelihood"):
        order, other = ("answers first", "likelihood") if fmt.answer_first else ("reasons before it answers", "reason")
        raise UserError(
            f"config.recipe.format {fmt.inputs}-{fmt.targets} {order}; use --config.eval.mode={other} or generate"
        )
    return mode


def answers(
    config, runtime: Runtime, pictures: ImageBatcher | None = None
) -> LikelihoodAnswerer | GenerativeAnswerer | ReasoningAnswerer:
    """Answers questions in the way that `config.eval.mode` asks for.

    Args:
      pictures: of the questions, for a student that sees.
    """
    return _WAYS[answer_mode(config)](config, runtime, pictures)


def _prompts(encoder, fmt, problems: Sequence[Problem], virtual: SoftPromptTokens) -> list[list[int]]:
    encoded = encoder.encode(problems, [fmt] * len(problems))
    for problem, one in zip(problems, encoded, strict=True):
        if not one.fits:
            raise UserError(
                f"question {problem.pid}: question and choices take {len(one.tokens)} tokens, more than config.recipe.max_prompt; raise it"
            )
    return [virtual.put(one.tokens, one.behind_picture) for one in encoded]
