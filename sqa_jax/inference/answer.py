"""Answering questions: by the options' likelihood, by generated text that is parsed, or by both in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sqa_jax import adapters
from sqa_jax.batches.config_data import encoder_for
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.data.answers import parse_answer
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.inference.generate import Generator
from sqa_jax.inference.likelihood import LikelihoodScorer, MultipleChoice, branched_sequence, choose
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT
from sqa_jax.parallel.mesh import check_rows
from sqa_jax.prompts.formats import ANSWER_IS, option_targets
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.runtime import Runtime


class Prediction(NamedTuple):
    """The answer to one question.

    Attributes:
      index: of the question, among those that were asked.
      answer: index of the chosen option, or None where the text chooses none.
      text: the answer sentence, or the generated text.
      prompt_tokens, generated_tokens, scored_tokens: tokens that were prefilled (prompt and options), tokens that the
        student generated, and tokens whose likelihood it gave.
    """

    index: int
    answer: int | None
    text: str
    prompt_tokens: int
    generated_tokens: int
    scored_tokens: int


class LikelihoodAnswerer:
    """Multiple-choice scoring: answers with the option whose answer sentence is likeliest.

    Raises:
      UserError: a setting is not known.
    """

    def __init__(self, config, runtime: Runtime, images: ImageBatcher | None = None):
        settings = config.eval
        if settings.normalize not in ("none", "length"):
            raise UserError(f"config.eval.normalize is {settings.normalize!r}; choose none or length")
        check_rows(settings.batch_rows, runtime.mesh, "eval.batch_rows")
        self._prompts = _Prompts(config, runtime, images)
        self._normalize, self._style = settings.normalize, config.recipe.answer
        self._scorer = LikelihoodScorer(
            config.adapter, runtime.decoder, runtime.mesh, settings.row_length, settings.batch_rows, images
        )

    def __call__(
        self, adapter: ParamTree, base: ParamTree, problems: Sequence[Problem], reasons: Sequence[str] | None = None
    ) -> Iterator[Prediction]:
        """Yields an answer to each question, batch by batch.

        Args:
          reasons: reasoning that the answer sentence of each question follows.
        """
        prompts = self._prompts(adapter, problems)
        reasons = reasons or [""] * len(problems)
        targets = [option_targets(*pair, self._style) for pair in zip(problems, reasons, strict=True)]
        ids = iter(self._prompts.encoder.plain([target for options in targets for target in options]))
        questions = [
            MultipleChoice(prompt, [next(ids) for _ in options])
            for prompt, options in zip(prompts, targets, strict=True)
        ]
        for index, log_probs in self._scorer(adapter, base, questions):
            answer = choose(log_probs, self._normalize)
            sequence = branched_sequence(questions[index])
            yield Prediction(index, answer, targets[index][answer], len(sequence.tokens), 0, len(sequence.targets))


class GenerativeAnswerer:
    """Answers with generated text, parsed as any reply is."""

    def __init__(self, config, runtime: Runtime, images: ImageBatcher | None = None):
        settings, student = config.eval, runtime.student
        self._prompts, self._tokenizer = _Prompts(config, runtime, images), student.tokenizer
        self._generator = Generator(
            config.adapter, runtime.decoder, runtime.mesh, student.eos_ids, settings.max_new_tokens,
            settings.batch_questions, settings.temperature, config.seed, images,
        )  # fmt: skip

    def __call__(self, adapter: ParamTree, base: ParamTree, problems: Sequence[Problem]) -> Iterator[Prediction]:
        """Yields an answer to each question, as texts end."""
        prompts = self._prompts(adapter, problems)
        for index, ids in self._generator(adapter, base, prompts):
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            answer = parse_answer(text, problems[index].choices)
            yield Prediction(index, answer, text, len(prompts[index]), len(ids) + 1, 0)


class ReasoningAnswerer:
    """Generates the reasoning, then answers with the option that is likeliest after it: no answer is unparsed.

    What is scored is the whole target, as training tokenizes it: reasoning, line end, answer sentence. Reasoning
    that `config.eval.max_new_tokens` cuts off is used as far as it goes.
    """

    def __init__(self, config, runtime: Runtime, images: ImageBatcher | None = None):
        self._generate = GenerativeAnswerer(config, runtime, images)
        self._score = LikelihoodAnswerer(config, runtime, images)
        # Texts that are scored together, and at most lost when interrupted.
        self._chunk = 4 * config.eval.batch_questions

    def __call__(self, adapter: ParamTree, base: ParamTree, problems: Sequence[Problem]) -> Iterator[Prediction]:
        """Yields an answer to each question, a chunk of them at a time."""
        generated = self._generate(adapter, base, problems)
        while chunk := list(itertools.islice(generated, self._chunk)):
            reasons = [_before_answer(text.text) for text in chunk]
            for scored in self._score(adapter, base, [problems[text.index] for text in chunk], reasons):
                text = chunk[scored.index]
                yield scored._replace(
                    index=text.index,
                    prompt_tokens=text.prompt_tokens + scored.prompt_tokens,
                    generated_tokens=text.generated_tokens,
                )


def _before_answer(text: str) -> str:
    """A generated text up to its last answer sentence, or all of it where it has none."""
    reason = text[: text.rfind(ANSWER_IS)] if ANSWER_IS in text else text
    return reason.strip()


Answerer = LikelihoodAnswerer | GenerativeAnswerer | ReasoningAnswerer
_ANSWERERS: dict[str, Callable[..., Answerer]] = {
    "likelihood": LikelihoodAnswerer,
    "reason": ReasoningAnswerer,
    "generate": GenerativeAnswerer,
}


def answer_mode(config) -> str:
    """What `config.eval.mode` means for the recipe's format; "auto" is what the format calls for.

    Raises:
      UserError: the mode is not known, or the format does not allow it.
    """
    mode, fmt = config.eval.mode, arm_format(config.recipe)
    if mode == "auto":
        return "likelihood" if fmt.answer_first else "reason"
    if mode not in _ANSWERERS:
        raise UserError(f"config.eval.mode is {mode!r}; choose one of auto, {', '.join(_ANSWERERS)}")
    if mode != "generate" and fmt.answer_first != (mode == "likelihood"):
        order, other = ("answers first", "likelihood") if fmt.answer_first else ("reasons before it answers", "reason")
        raise UserError(
            f"config.recipe.format {fmt.inputs}-{fmt.targets} {order}; use --config.eval.mode={other} or generate"
        )
    return mode


def make_answerer(config, runtime: Runtime, images: ImageBatcher | None = None) -> Answerer:
    """What answers questions by `config.eval.mode`: (adapter, base, problems) → predictions.

    Args:
      images: of the questions, for a vision-language model.
    """
    return _ANSWERERS[answer_mode(config)](config, runtime, images)


class _Prompts:
    """Encodes questions as prompts of the recipe's format, soft prompt tokens included."""

    def __init__(self, config, runtime: Runtime, images: ImageBatcher | None):
        self._format, self._soft_prompt = arm_format(config.recipe), adapters.soft_prompt_tokens(config.adapter)
        self.encoder = encoder_for(config, runtime.student.tokenizer, images and images.images)

    def __call__(self, adapter: ParamTree, problems: Sequence[Problem]) -> list[list[int]]:
        soft_prompt = self._soft_prompt if "prompt" in adapter else NO_SOFT_PROMPT
        encoded = self.encoder.encode(problems, [self._format] * len(problems))
        for problem, prompt in zip(problems, encoded, strict=True):
            if not prompt.fits:
                raise UserError(
                    f"question {problem.pid}: question and choices take {len(prompt.tokens)} tokens, more than "
                    "config.recipe.max_prompt; raise it"
                )
        return [soft_prompt.put(prompt.tokens, prompt.image_end) for prompt in encoded]
