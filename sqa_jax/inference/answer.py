"""From questions to predictions, by one of two ways: likelihood of the options, or generated and parsed text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqa_jax.data.dataset import encoder_for
from sqa_jax.data.problem import Problem
from sqa_jax.data.prompts import option_targets
from sqa_jax.data.recipes import arm_format
from sqa_jax.errors import UserError
from sqa_jax.inference.generate import Generator
from sqa_jax.inference.likelihood import Choice, LikelihoodScorer, choose
from sqa_jax.metrics.answers import parse_answer
from sqa_jax.parallel.mesh import batch_sharding, check_rows
from sqa_jax.runtime import Runtime

# (index of the question, index of the chosen option or None, text that says so)
Answered = tuple[int, int | None, str]


class LikelihoodAnswers:
    """Answers with the option whose answer sentence the student finds likeliest.

    Raises:
      UserError: the format reasons before it answers, or a setting is not known.
    """

    def __init__(self, config, runtime: Runtime):
        settings = config.eval
        if settings.normalize not in ("none", "length"):
            raise UserError(f"config.eval.normalize is {settings.normalize!r}; choose none or length")
        check_rows(settings.batch_rows, runtime.mesh, "eval.batch_rows")
        self._normalize, self._style = settings.normalize, config.recipe.answer
        self._format = arm_format(config.recipe)
        self._encoder = encoder_for(config, runtime.student.tokenizer)
        self._scorer = LikelihoodScorer(
            config.adapter, runtime.decoder, settings.row_length, settings.batch_rows, batch_sharding(runtime.mesh)
        )

    def __call__(self, adapter: Any, base: Any, problems: Sequence[Problem]) -> Iterator[Answered]:
        prompts = _prompts(self._encoder, self._format, problems)
        sentences = [option_targets(problem, self._format, self._style) for problem in problems]
        ids = iter(self._encoder.plain([s for own in sentences for s in own]))
        choices = [Choice(prompt, [next(ids) for _ in own]) for prompt, own in zip(prompts, sentences, strict=True)]
        for index, log_probs in self._scorer(adapter, base, choices):
            answer = choose(log_probs, self._normalize)
            yield index, answer, sentences[index][answer]


class GeneratedAnswers:
    """Answers with what the student writes, read as any reply is read."""

    def __init__(self, config, runtime: Runtime):
        settings, student = config.eval, runtime.student
        self._format, self._tokenizer = arm_format(config.recipe), student.tokenizer
        self._encoder = encoder_for(config, student.tokenizer)
        self._generator = Generator(
            config.adapter, runtime.decoder, student.eos_ids, settings.max_new_tokens, settings.batch_questions,
            settings.temperature, config.seed,
        )  # fmt: skip

    def __call__(self, adapter: Any, base: Any, problems: Sequence[Problem]) -> Iterator[Answered]:
        prompts = _prompts(self._encoder, self._format, problems)
        for index, ids in self._generator(adapter, base, prompts):
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            yield index, parse_answer(text, problems[index].choices), text


def answers(config, runtime: Runtime) -> LikelihoodAnswers | GeneratedAnswers:
    """The way that `config.eval.mode` names."""
    ways = {"likelihood": LikelihoodAnswers, "generate": GeneratedAnswers}
    if config.eval.mode not in ways:
        raise UserError(f"config.eval.mode is {config.eval.mode!r}; choose likelihood or generate")
    return ways[config.eval.mode](config, runtime)


def _prompts(encoder, fmt, problems: Sequence[Problem]) -> list[list[int]]:
    encoded = encoder.encode(problems, [fmt] * len(problems))
    for problem, one in zip(problems, encoded, strict=True):
        if not one.fits:
            raise UserError(
                f"question {problem.pid}: question and choices take {len(one.tokens)} tokens, more than config.recipe.max_prompt; raise it"
            )
    return [one.tokens for one in encoded]
