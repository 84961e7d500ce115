"""A baseline that knows no language: logistic regression over hashed words of question and option.

Reads:  problems, as `python -m sqa_jax.score` does; learns from the split --train_split.
Writes: predictions of --split as JSONL.

Example:
  python -m sqa_jax.metrics.bag_of_words --problems sample --split test --out runs/bag_of_words.jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from absl import flags

from sqa_jax import cli
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_write


def features(problem: Problem, option: str) -> list[str]:
    """Word unigrams and bigrams of the option, of the context, and every pair of an option's and a context's word."""

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    context, own = words(f"{problem.question} {problem.hint} {problem.caption}"), words(option)
    pairs = [f"{a}_{b}" for a, b in zip(own, own[1:], strict=False)]
    crossed = [f"{a}|{b}" for a in set(own) for b in set(context)]
    return [*own, *pairs, *crossed, "option in context" if option.lower() in problem.hint.lower() else ""]


def predict(train: Sequence[Problem], test: Sequence[Problem]) -> dict[str, int]:
    """Learns which options are right in `train`, and chooses the likeliest option of each question of `test`."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import LogisticRegression

    hasher = FeatureHasher(2**20, input_type="string")
    rows = hasher.transform(features(p, option) for p in train for option in p.choices)
    labels = [k == p.answer for p in train for k in range(len(p.choices))]
    model = LogisticRegression(C=1.0, max_iter=200).fit(rows, labels)
    scores = iter(model.decision_function(hasher.transform(features(p, option) for p in test for option in p.choices)))
    answers = {}
    for problem in test:
        own = [next(scores) for _ in problem.choices]
        answers[problem.pid] = max(range(len(own)), key=own.__getitem__)
    return answers


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
    flags.DEFINE_string("problems", "", 'Problems directory, or "sample", "pictures", "pictures-shifted".')
    flags.DEFINE_string("splits", "pid_splits.json", "The file in it that deals pids to splits.")
    flags.DEFINE_string("train_split", "train", "Split to learn from.")
    flags.DEFINE_string("split", "test", "Split to predict.")
    flags.DEFINE_integer("limit", 0, "Predict only so many questions of the split, the first; 0 is all.", lower_bound=0)
    flags.DEFINE_string("out", "", "Where the predictions go.")
    cli.run(main)
