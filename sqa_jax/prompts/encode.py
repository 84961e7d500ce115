"""Tokenization of prompts and targets, in batches; long prompts are truncated, the lecture first, then the hint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from sqa_jax.data.problem import Problem
from sqa_jax.models.vision.registry import VisionConfig
from sqa_jax.prompts.formats import Format, Template, sections


@runtime_checkable
class PromptImages(Protocol):
    """What puts images into prompts: an `ImageStore`, or a stand-in that writes placeholders."""

    @property
    def vision(self) -> VisionConfig: ...

    def prompt_ids(self, pid: str, tokenizer: Any) -> list[int]:
        """The tokens of a question's image; none without one."""
        ...


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A prompt, and its target where there is one, as ids.

    Attributes:
      tokens: prompt, then target, then the end token (a prompt alone has neither).
      prompt_length: how many of them are prompt.
      image_end: how many of them end with the prompt's image; 0 where it has none.
      truncated: tokens cut off, by part of the prompt ("lecture", "hint").
      fits: False where the prompt is too long even without lecture and hint.
    """

    tokens: list[int]
    prompt_length: int
    image_end: int
    truncated: dict[str, int]
    fits: bool


class Encoder:
    """Tokenizes prompts for training and for inference: the same code, so the same ids.

    Each part of a prompt is tokenized separately, so truncating one never changes the ids of another, and user text
    never becomes a special token.

    Args:
      tokenizer: of the student.
      max_prompt: maximum tokens of a prompt without its image's, whatever the target: a prompt must not depend on it.
      chat: use the tokenizer's chat template if it has one.
      caption: image captions are context.
      around: the text before the prompt and between prompt and target, in place of the template's.
      images: of the questions, for a vision-language model.

    Attributes:
      around: these two texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_prompt: int,
        chat: bool,
        caption: bool,
        around: tuple[str, str] | None = None,
        images: PromptImages | None = None,
    ):
        self.tokenizer, self.max_prompt, self.caption, self.images = tokenizer, max_prompt, caption, images
        if around is None:
            template = Template(tokenizer, chat, images and images.vision)
            around = template.before, template.after
            if images is not None:
                self._around_image = self.control(template.around_image)
        self.around = around
        self._before, self._after = self.control(around)
        # SentencePiece vocabularies hold special tokens as ordinary pieces, which plain text must not match either.
        unknown: int | None = tokenizer.unk_token_id
        self._unknown: dict[int, int] = (
            {} if unknown is None else {token: unknown for token in tokenizer.all_special_ids}
        )

    def control(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of text in which special tokens are parsed."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of text in which special tokens are plain text."""
        if not texts:
            return []
        encoded: list[list[int]]
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [[self._unknown.get(token, token) for token in ids] for ids in encoded]

    def parts(self, problem: Problem, fmt: Format) -> list[tuple[str, str]]:
        """Kind and text of each part of a prompt, without the template around it."""
        parts = sections(problem, fmt, self.caption)
        return [(kind, ("" if k == 0 else "\n") + label + text) for k, (kind, label, text) in enumerate(parts)]

    def encode(
        self, problems: Sequence[Problem], formats: Sequence[Format], targets: Sequence[str] | None = None
    ) -> list[Encoded]:
        """Tokenizes a batch.

        Args:
          problems: the questions, each with the lecture and solution that its prompt shows.
          formats: the format of each.
          targets: the text to learn of each; None tokenizes prompts only.
        """
        texts: list[str] = []
        kinds: list[list[str]] = []
        for problem, fmt in zip(problems, formats, strict=True):
            parts = self.parts(problem, fmt)
            kinds.append([kind for kind, _ in parts])
            texts += [text for _, text in parts]
        ids = iter(self.plain(texts))
        endings: list[list[int]] = [[] for _ in problems]
        if targets is not None:
            endings = [[*target, self.tokenizer.eos_token_id] for target in self.plain(targets)]
        return [
            self._join(problem.pid, [next(ids) for _ in names], names, ending)
            for problem, names, ending in zip(problems, kinds, endings, strict=True)
        ]

    def encode_prompts(self, pids: Sequence[str], texts: Sequence[str]) -> list[Encoded]:
        """Tokenizes prompts whose text is given, each with the image of its question."""
        return [self._join(pid, [ids], [""], []) for pid, ids in zip(pids, self.plain(texts), strict=True)]

    def encode_texts(self, texts: Sequence[str], max_target: int) -> list[list[Encoded]]:
        """Tokenizes plain texts as in pretraining, each in chunks of at most `max_target` tokens, end token included.

        A chunk's "prompt" is one token, from which the first token of the text is learned: the student's BOS token if
        it has one, else its EOS token. The encoder of an encoder–decoder gets an empty prompt.
        """
        tokenizer = self.tokenizer
        start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        if hasattr(tokenizer, "decoder_start_token"):
            start = self._after
        encoded = []
        for ids in self.plain(texts):
            ids = [*ids, tokenizer.eos_token_id]
            chunks = [ids[k : k + max_target] for k in range(0, len(ids), max_target)]
            encoded.append([Encoded([*start, *chunk], len(start), 0, {}, True) for chunk in chunks])
        return encoded

    def _join(self, pid: str, parts: list[list[int]], kinds: list[str], ending: list[int]) -> Encoded:
        """Assembles a prompt from the ids of its parts, truncated where needed, and appends `ending`."""
        image = [] if self.images is None else self.images.prompt_ids(pid, self.tokenizer)
        before_image, before = self._around_image if image else ([], self._before)
        excess = len(before_image) + len(before) + sum(map(len, parts)) + len(self._after) - self.max_prompt
        truncated: dict[str, int] = {}
        for truncatable in ("lecture", "hint"):
            for k, kind in enumerate(kinds):
                if kind == truncatable and excess > 0:
                    cut = min(excess, len(parts[k]))
                    parts[k] = parts[k][: len(parts[k]) - cut]
                    truncated[kind] = cut
                    excess -= cut
        head = [*before_image, *image]
        prompt = head + before + [token for part in parts for token in part] + self._after
        return Encoded(prompt + ending, len(prompt), len(head), truncated, excess <= 0)
