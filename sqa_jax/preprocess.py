"""Builds the pre-tokenized distillation dataset of a configuration, or finds it built already.

Reads:  the questions and teacher replies that config.data names, the student's tokenizer.
Writes: <config.data.cache>/<fingerprint>/ with Arrow rows and manifest.json; for a student that sees, also
        <config.data.cache>/pictures-<fingerprint>/ with the questions' pictures as its tower reads them. The same
        configuration makes the same fingerprint, and nothing is built twice.

Example:
  python -m sqa_jax.preprocess --config configs/scienceqa.py --config.data.path=/data/ScienceQA \\
      --config.recipe.format=QCM-EA
"""

from __future__ import annotations

import itertools
from typing import Any

from absl import flags

from sqa_jax import cli


def describe(dataset, reused: bool, tokenizer: Any, vocabulary: int) -> str:
    """What a person wants to know about a dataset, with its first row decoded.

    Args:
      vocabulary: of the student; tokens behind it are what a row sees.
    """
    m = dataset.manifest
    lines = [
        f"{'reused' if reused else 'built'} {dataset.path}: {m['rows']} rows of {m['questions']} questions, arm {m['arm']}",
        "  tokens a row:   " + ", ".join(f"{k} {v}" for k, v in m["tokens"].items()),
        "  target tokens:  " + ", ".join(f"{k} {v}" for k, v in m["target_tokens"].items()),
    ]
    if pictures := m.get("pictures"):
        lines += [
            f"  pictures:        {pictures['distinct']} distinct of {pictures['questions']} questions, "
            f"{pictures['bytes'] / 1e6:.1f} MB in {dataset.path.with_name(pictures['pieces'])}",
            "  features of one: " + ", ".join(f"{k} {v}" for k, v in pictures["features"].items()),
        ]
    lines += [f"  shortened {part}: {cut['rows']} rows, {cut['tokens']} tokens" for part, cut in m["shortened"].items()]
    lines += [
        f"  dropped, {reason}: {cut['rows']} (questions {', '.join(cut['pids'][:3])}{' …' * (cut['rows'] > 3)})"
        for reason, cut in m["dropped"].items()
    ]
    tokens, prompt_lengths, *_ = dataset.columns()
    first, end = tokens[0], prompt_lengths[0]
    lines += [
        "  first row:",
        _indent(_readable(first[:end], tokenizer, vocabulary)),
        "  its target:",
        _indent(tokenizer.decode(first[end:])),
    ]
    return "\n".join(lines)


def _readable(tokens: Any, tokenizer: Any, vocabulary: int) -> str:
    """The text of tokens, with "<image 256>" in place of 256 features of a picture."""
    return "".join(
        f"<image {len(own)}>" if seen else tokenizer.decode(own)
        for seen, group in itertools.groupby(tokens, lambda token: token >= vocabulary)
        for own in [list(group)]
    )


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())


def main() -> None:
    from sqa_jax.batches.dataset import build_or_reuse, config_pictures, load_config_problems, training_problems
    from sqa_jax.checkpoints.load import student_config
    from sqa_jax.checkpoints.tokenizer import load_tokenizer

    config = flags.FLAGS.config
    path, revision = config.student.path, config.student.revision
    tokenizer, student = load_tokenizer(path, revision), student_config(path, revision, config.student.picture_tokens)
    problems = load_config_problems(config)
    pictures = config_pictures(config, student, training_problems(config, problems))
    dataset, reused = build_or_reuse(config, tokenizer, problems, pictures)
    print(describe(dataset, reused, tokenizer, student.vocab_size))
    if pictures is not None and pictures.failed:
        print(f"  {pictures.complaint()}")


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    cli.run(main)
