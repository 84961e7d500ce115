"""Prompts and targets as ids, in batches, with what is too long shortened: the lecture first, then the hint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sqa_jax.data.images import ImageStore
from sqa_jax.data.problem import Problem
from sqa_jax.prompts.formats import Format, Template, sections


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A prompt, and its target where there is one, as ids.

    Attributes:
      tokens: prompt, then target, then the end token (a prompt alone has neither).
      prompt_length: how many of them are prompt.
      behind_picture: how many of them end with the prompt's picture; 0 where it has none.
      shortened: tokens taken away, by part ("lecture", "hint").
      fits: False where even without lecture and hint it is longer than allowed.
    """

    tokens: list[int]
    prompt_length: int
    behind_picture: int
    shortened: dict[str, int]
    fits: bool


class Encoder:
    """Encodes prompts for training and for inference: the same ids for both, by being the same code.

    Each part of a prompt is tokenized by itself, so shortening one never changes the ids of another, and user
    text never becomes a special token.

    Args:
      tokenizer: of the student.
      max_prompt: most tokens of a prompt, a picture's aside, whatever its target: what a prompt looks like must not
        depend on it.
      chat: use the tokenizer's chat template where it has one.
      caption: image captions are context.
      around: the text in front of the prompt and between prompt and target, in place of the template's.
      pictures: of the questions, for a student that sees.

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
        pictures: ImageStore | None = None,
    ):
        self.tokenizer, self.max_prompt, self.caption, self.pictures = tokenizer, max_prompt, caption, pictures
        if around is None:
            template = Template(tokenizer, chat, pictures and pictures.vision)
            around = template.before, template.after
            if pictures is not None:
                self._around_picture = self.control(template.around_picture)
        self.around = around
        self._before, self._after = self.control(around)
        # Vocabularies of sentencepiece hold special tokens as words, which plain text must not match either.
        unknown = tokenizer.unk_token_id
        self._unknown = {} if unknown is None else dict.fromkeys(tokenizer.all_special_ids, unknown)

    def control(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of text in which special tokens are meant."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of text in which special tokens are only spelled out."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [[self._unknown.get(token, token) for token in ids] for ids in encoded]

    def parts(self, problem: Problem, fmt: Format) -> list[tuple[str, str]]:
        """Kind and text of each part of a prompt, between the texts around it."""
        own = sections(problem, fmt, self.caption)
        return [(kind, ("" if k == 0 else "\n") + label + text) for k, (kind, label, text) in enumerate(own)]

    def encode(
        self, problems: Sequence[Problem], formats: Sequence[Format], targets: Sequence[str] | None = None
    ) -> list[Encoded]:
        """Encodes a batch.

        Args:
          problems: the questions, each with the lecture and solution that its prompt is to show.
          formats: of each.
          targets: of each, the text to learn; None encodes prompts only.
        """
        texts: list[str] = []
        kinds: list[list[str]] = []
        for problem, fmt in zip(problems, formats, strict=True):
            parts = self.parts(problem, fmt)
            kinds.append([kind for kind, _ in parts])
            texts += [text for _, text in parts]
        ids = iter(self.plain(texts))
        ends = [[] for _ in problems]
        if targets is not None:
            ends = [target + [self.tokenizer.eos_token_id] for target in self.plain(targets)]
        return [
            self._join(problem.pid, [next(ids) for _ in own], own, end)
            for problem, own, end in zip(problems, kinds, ends, strict=True)
        ]

    def encode_prompts(self, pids: Sequence[str], texts: Sequence[str]) -> list[Encoded]:
        """Encodes prompts whose text is given, each with the picture of its question."""
        return [self._join(pid, [ids], [""], []) for pid, ids in zip(pids, self.plain(texts), strict=True)]

    def encode_texts(self, texts: Sequence[str], max_target: int) -> list[list[Encoded]]:
        """Encodes plain texts, each in pieces of at most `max_target` tokens with the end token.

        A piece begins with the student's first token where it has one, else its end token, as in pretraining:
        its "prompt" of one token, from which the first token of the text is learned. An encoder–decoder's is empty.
        """
        tokenizer = self.tokenizer
        start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        if hasattr(tokenizer, "decoder_start_token"):
            start = self._after
        encoded = []
        for ids in self.plain(texts):
            ids = [*ids, tokenizer.eos_token_id]
            pieces = [ids[k : k + max_target] for k in range(0, len(ids), max_target)]
            encoded.append([Encoded([*start, *piece], len(start), 0, {}, True) for piece in pieces])
        return encoded

    def _join(self, pid: str, parts: list[list[int]], kinds: list[str], end: list[int]) -> Encoded:
        picture = [] if self.pictures is None else self.pictures.prompt(pid, self.tokenizer)
        front, before = self._around_picture if picture else ([], self._before)
        excess = len(front) + len(before) + sum(map(len, parts)) + len(self._after) - self.max_prompt
        shortened: dict[str, int] = {}
        for wanted in ("lecture", "hint"):
            for k, kind in enumerate(kinds):
                if kind == wanted and excess > 0:
                    cut = min(excess, len(parts[k]))
                    parts[k] = parts[k][: len(parts[k]) - cut]
                    shortened[kind] = cut
                    excess -= cut
        shown = [*front, *picture]
        prompt = shown + before + [token for part in parts for token in part] + self._after
        return Encoded(prompt + end, len(prompt), len(shown), shortened, excess <= 0)
