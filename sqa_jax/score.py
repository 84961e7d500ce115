"""Scores predictions of any system by the columns of ScienceQA's leaderboard; needs neither JAX nor a model.

Reads:  a problems directory (ScienceQA's layout) or an embedded source, such as "sample"; predictions as JSONL rows
        {"pid": "4", "answer": 1 or null} or as ScienceQA's {"results": {"4": 1}} (.json).
Writes: metrics as JSON on standard output; with --format table or markdown a table of one or more systems,
        with 95 % intervals, and the paired difference of the last system from the first.

Examples:
  python -m sqa_jax.score --problems /data/ScienceQA --split test --predictions predictions.jsonl
  python -m sqa_jax.score --problems sample --split test --format table \\
      --predictions zero-shot=runs/zero/eval/test/predictions.jsonl --predictions trained=runs/lora/eval/test/predictions.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError


def main() -> None:
    from sqa_jax.data.sources import problems_of_flag
    from sqa_jax.metrics.leaderboard import read_predictions, score

    FLAGS = flags.FLAGS
    if not FLAGS.problems or not FLAGS.predictions:
        raise UserError("--problems and --predictions are needed; see --help")
    problems = problems_of_flag(FLAGS.problems, FLAGS.splits).split(FLAGS.split)
    problems = problems[: FLAGS.limit or None]
    files = {}
    for given in FLAGS.predictions:
        name, _, file = given.rpartition("=")
        name = name or Path(file).stem
        if name in files:
            raise UserError(
                f"--predictions: two systems are called {name}; name them, as in --predictions zero-shot={file}"
            )
        files[name] = file
    if FLAGS.format == "json":
        if len(files) > 1:
            raise UserError("--format json takes one --predictions; use --format table or markdown to compare systems")
        (file,) = files.values()
        print(json.dumps(score(problems, read_predictions(file), file), indent=2))
        return
    from sqa_jax.reporting.tables import comparison  # imports SciPy

    systems = {name: read_predictions(file) for name, file in files.items()}
    print(comparison(problems, systems, FLAGS.format == "markdown"))


if __name__ == "__main__":
    flags.DEFINE_string(
        "problems", "", 'Problems directory, or "sample", "image-questions", "image-questions-shifted".'
    )
    flags.DEFINE_string("splits", "pid_splits.json", "File in it that assigns questions to splits.")
    flags.DEFINE_string("split", "test", "Split to score.")
    flags.DEFINE_integer("limit", 0, "Score only the first so many questions of the split; 0 is all.", lower_bound=0)
    flags.DEFINE_multi_string("predictions", [], "Predictions file, or name=file; may be repeated.")
    flags.DEFINE_enum("format", "json", ["json", "table", "markdown"], "How to write the result.")
    cli.run(main)
