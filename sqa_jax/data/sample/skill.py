"""Skills: a function that drafts a question, with the labels that ScienceQA would give it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from sqa_jax.data.sample.banks import NAMES, split_entries


@dataclasses.dataclass(frozen=True)
class Draft:
    """A question before it is shuffled and numbered.

    Attributes:
      right: the right option; `wrong` are the others.
      solution: why it is right.
      drawing: what `draw` draws, {"kind": …, …}; None for a question without an image.
    """

    question: str
    right: str
    wrong: tuple[str, ...]
    solution: str
    hint: str = ""
    caption: str = ""
    drawing: dict[str, Any] | None = None


class SplitSampler:
    """Random choices for one split; held-out splits have entries of the banks to themselves."""

    def __init__(self, rng: random.Random, held_out: bool):
        self.rng, self.held_out = rng, held_out

    def bank(self, entries: list) -> list:
        return split_entries(entries, self.held_out)

    def pick(self, entries: list) -> Any:
        """A random entry of a bank that this split may use."""
        return self.rng.choice(self.bank(entries))

    def some(self, entries: list, count: int) -> list:
        """Several different entries."""
        return self.rng.sample(self.bank(entries), count)


@dataclasses.dataclass(frozen=True)
class Skill:
    """A skill with ScienceQA's labels.

    Attributes:
      draft: drafts one question.
      grades: first and last school year in which it is asked.
      lecture: the background knowledge.
    """

    name: str
    subject: str
    topic: str
    category: str
    grades: tuple[int, int]
    lecture: str
    draft: Callable[[SplitSampler], Draft]


def which_is(
    sampler: SplitSampler, groups: dict[str, list[str]], question: str, solution: str, wrong: int, negate: bool = True
) -> Draft:
    """ "Which of these is a mammal?", or, rarely, "… is not a mammal?".

    Args:
      groups: {label: entries}.
      question: with "{is_a}" where "is a(n) label" or "is not a(n) label" goes.
      solution: with "{entry}" and "{label}".
      wrong: how many wrong options.
    """
    rng = sampler.rng
    label = rng.choice(sorted(groups))
    members, others = (
        sampler.bank(groups[label]),
        [e for name in sorted(groups) if name != label for e in sampler.bank(groups[name])],
    )
    if negate and len(members) >= wrong and rng.random() < 0.15:
        right, rest = rng.choice(others), rng.sample(members, wrong)
        is_a = f"is not {with_article(label)}"
        label = next(name for name, entries in groups.items() if right in entries)
    else:
        right, rest = rng.choice(members), rng.sample(others, wrong)
        is_a = f"is {with_article(label)}"
    text = solution.format(entry=right, label=with_article(label))
    return Draft(question.format(is_a=is_a), right, tuple(rest), text[0].upper() + text[1:])


def which_label(
    sampler: SplitSampler, groups: dict[str, list[str]], question: str, solution: str, wrong: int = 0
) -> Draft:
    """ "What kind of animal is a salmon?": the options are labels; `wrong` 0 shows all of them.

    Args:
      question: with "{entry}" or "{a_entry}", and "{name}" where a person's name goes.
    """
    rng = sampler.rng
    label = rng.choice(sorted(groups))
    entry = rng.choice(sampler.bank(groups[label]))
    rest = [name for name in sorted(groups) if name != label]
    rest = rng.sample(rest, wrong) if wrong else rest
    text = solution.format(entry=entry, label=label)
    return Draft(
        question.format(entry=entry, a_entry=with_article(entry), name=sampler.pick(NAMES)),
        label,
        tuple(rest),
        text[0].upper() + text[1:],
    )


def with_article(noun: str) -> str:
    """ "a mammal", "an insect"; what has an article, or is a name or a mass, stays as it is."""
    if noun.startswith(("a ", "an ", "the ")) or noun[0].isupper():
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
