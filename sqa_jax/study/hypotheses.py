"""The hypotheses of the study, and the verdict that a comparison gives on one."""

from __future__ import annotations

import dataclasses

from sqa_jax.metrics.paired_tests import Comparison

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A statement that arm `second` is more (or less) accurate than arm `first`.

    Attributes:
      sign: +1 where it says that `second` is better, -1 where it says worse.
      soft: only about soft prompts on vision-language models.
      images: only about questions with an image.
    """

    name: str
    statement: str
    first: str
    second: str
    sign: int
    soft: bool = False
    images: bool = False

    def applies_to(self, has_vision: bool, adapter: str) -> bool:
        """Whether it is about such a student, adapted by methods such as "prompt+visual"."""
        return not self.soft or (has_vision and set(adapter.split("+")) <= SOFT)


SOFT = {"prompt", "prefix", "visual"}  # methods that insert trained tokens, or their keys and values

HYPOTHESES = (
    Hypothesis("H2", "Soft prompts improve a good multimodal model.", "zero_shot", "golden", +1, soft=True),
    Hypothesis(
        "H2, images", "They do so on questions with an image.", "zero_shot", "golden", +1, soft=True, images=True
    ),
    Hypothesis(
        "H2, teacher", "So do those that learned from the teacher's answers and solutions.",
        "zero_shot", "teacher_answer", +1, soft=True,
    ),
    Hypothesis(
        "H3.1",
        "Learning from the teacher's answer and solution instead of the data's lowers accuracy.",
        "golden", "teacher_answer", -1,
    ),
    Hypothesis(
        "H3.2",
        "Learning from the teacher's and the data's answer and solution together lowers it too.",
        "golden", "teacher_and_golden", -1,
    ),
    Hypothesis(
        "H3.3",
        "The teacher's chain of thought teaches better than its answer and solution.",
        "teacher_answer", "teacher_cot", +1,
    ),
    Hypothesis(
        "H3.4",
        "The teacher's answer and solution with the retrieved lecture teaches better than without it.",
        "teacher_answer", "teacher_lecture", +1,
    ),
    Hypothesis(
        "H3.5",
        "Learning from the teacher's mistakes and their correction, with the lecture, helps more.",
        "teacher_lecture", "mistakes", +1,
    ),
    Hypothesis(
        "H3.6",
        "Reasoning paths teach better than the same number of tokens of domain text.",
        "domain_text", "teacher_cot", +1,
    ),
)  # fmt: skip


def verdict(hypothesis: Hypothesis, comparison: Comparison, adjusted_p: float) -> tuple[str, str]:
    """("supported" | "contradicted" | "undecided", the measurement in words).

    Decided where the adjusted p-value is below 0.05 and the interval excludes zero.
    """
    points, low, high = (100 * x for x in (comparison.difference, comparison.low, comparison.high))
    measured = (
        f"{hypothesis.second} − {hypothesis.first} = {points:+.1f} points "
        f"(95 % interval {low:+.1f} to {high:+.1f}, Holm-adjusted p = {adjusted_p:.2g}, n = {comparison.n})"
    )
    if adjusted_p < ALPHA and (low > 0 or high < 0):
        agrees = comparison.difference * hypothesis.sign > 0
        return ("supported" if agrees else "contradicted"), measured
    return (
        "undecided",
        f"{measured}; a difference below {100 * comparison.smallest:.1f} points would often go undetected here",
    )
