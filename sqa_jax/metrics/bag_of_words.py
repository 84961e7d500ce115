"""Bag-of-words baseline: logistic regression over hashed word features of a question and each of its options.

Reads:  problems, as `python -m sqa_jax.score` does; learns from the split --train_split.
Writes: predictions of --split as JSONL.

Example:
  python -m sqa_jax.metrics.bag_of_words --problems sample --split test --out runs/bag_of_words.jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from absl import flags

from sqa_jax import cli
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_write

COLUMNS = 2**20  # of the hashed features


def features(problem: Problem, option: str) -> list[str]:
    """Unigrams and bigrams of the option, every pair of an option word and a context word, and one for overlap."""

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    context, unigrams = words(f"{problem.question} {problem.hint} {problem.caption}"), words(option)
    bigrams = [f"{a}_{b}" for a, b in zip(unigrams, unigrams[1:], strict=False)]
    crossed = [f"{a}|{b}" for a in set(unigrams) for b in set(context)]
    return [*unigrams, *bigrams, *crossed, "option in context" if option.lower() in problem.hint.lower() else ""]


def _option_features(problems: Sequence[Problem]) -> Iterator[list[str]]:
    return (features(problem, option) for problem in problems for option in problem.choices)


def option_scores(train: Sequence[Problem], test: Sequence[Problem]) -> list[list[float]]:
    """Fits "this option is right" on `train`; returns a score for each option of each question of `test`."""
    import numpy as np

    from sqa_jax.metrics.feature_hashing import hashed_counts
    from sqa_jax.metrics.logistic_regression import fit

    labels = np.array([k == problem.answer for problem in train for k in range(len(problem.choices))], bool)
    weights, bias = fit(hashed_counts(_option_features(train), COLUMNS), labels)
    scores = iter((hashed_counts(_option_features(test), COLUMNS) @ weights + bias).tolist())
    return [[next(scores) for _ in problem.choices] for problem in test]


def predict(train: Sequence[Problem], test: Sequence[Problem]) -> dict[str, int]:
    """{pid: the highest-scoring option of each question of `test`}, learned from `train`."""
    return {
        problem.pid: max(range(len(scores)), key=scores.__getitem__)
        for problem, scores in zip(test, option_scores(train, test), strict=True)
    }


def main() -> None:
    from sqa_jax.data.sources import problems_of_flag

    FLAGS = flags.FLAGS
    if not FLAGS.problems or not FLAGS.out:
        raise UserError("--problems and --out are needed; see --help")
    problems = problems_of_flag(FLAGS.problems, FLAGS.splits)
    answers = predict(problems.split(FLAGS.train_split), problems.split(FLAGS.split)[: FLAGS.limit or None])
    with atomic_write(FLAGS.out) as file:
        for pid, answer in answers.items():
            file.write(json.dumps({"pid": pid, "answer": answer}) + "\n")
    print(f"wrote {len(answers)} predictions to {FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "problems", "", 'Problems directory, or "sample", "image-questions", "image-questions-shifted".'
    )
    flags.DEFINE_string("splits", "pid_splits.json", "File in it that assigns questions to splits.")
    flags.DEFINE_string("train_split", "train", "Split to learn from.")
    flags.DEFINE_string("split", "test", "Split to predict.")
    flags.DEFINE_integer("limit", 0, "Predict only the first so many questions of the split; 0 is all.", lower_bound=0)
    flags.DEFINE_string("out", "", "Where the predictions go.")
    cli.run(main)
