"""Builds the pre-tokenized distillation dataset of a configuration, or reuses the one that exists.

Reads:  the questions and teacher replies that config.data names, the student's tokenizer.
Writes: <config.data.cache>/<fingerprint>/ with Arrow rows and manifest.json; for a vision-language model also
        <config.data.cache>/pictures-<fingerprint>/ with the questions' preprocessed images. The same configuration
        has the same fingerprint, and nothing is built twice.

Example:
  python -m sqa_jax.preprocess --config configs/scienceqa.py --config.data.path=/data/ScienceQA \\
      --config.recipe.format=QCM-EA
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from absl import flags

from sqa_jax import cli

if TYPE_CHECKING:
    from sqa_jax.batches.dataset import DistillationDataset


def describe(dataset: DistillationDataset, reused: bool, tokenizer: Any, vocabulary: int) -> str:
    """A summary of a dataset for people, with its first row decoded.

    Args:
      reused: whether the dataset existed already.
      vocabulary: size of the student's; ids from there on stand for image features.
    """
    m = dataset.manifest
    lines = [
        f"{'reused' if reused else 'built'} {dataset.path}: {m['rows']} rows of {m['questions']} questions, arm {m['arm']}",
        "  tokens a row:   " + ", ".join(f"{k} {v}" for k, v in m["tokens"].items()),
        "  target tokens:  " + ", ".join(f"{k} {v}" for k, v in m["target_tokens"].items()),
    ]
    if images := m.get("pictures"):
        lines += [
            f"  images:          {images['distinct']} distinct of {images['questions']} questions, "
            f"{images['bytes'] / 1e6:.1f} MB in {dataset.path.with_name(images['pieces'])}",
            "  features each:   " + ", ".join(f"{k} {v}" for k, v in images["features"].items()),
        ]
    lines += [f"  truncated {part}: {cut['rows']} rows, {cut['tokens']} tokens" for part, cut in m["shortened"].items()]
    lines += [
        f"  dropped, {reason}: {cut['rows']} (questions {', '.join(cut['pids'][:3])}{' …' * (cut['rows'] > 3)})"
        for reason, cut in m["dropped"].items()
    ]
    tokens, prompt_lengths, *_ = dataset.columns()
    first, end = tokens[0], int(prompt_lengths[0])
    lines += [
        "  first row:",
        _indent(_readable(first[:end].tolist(), tokenizer, vocabulary)),
        "  its target:",
        _indent(tokenizer.decode(first[end:])),
    ]
    return "\n".join(lines)


def _readable(tokens: Iterable[int], tokenizer: Any, vocabulary: int) -> str:
    """The text of tokens, with "<image 256>" in place of 256 features of an image."""
    texts = []
    for are_features, group in itertools.groupby(tokens, lambda token: token >= vocabulary):
        ids = list(group)
        texts.append(f"<image {len(ids)}>" if are_features else tokenizer.decode(ids))
    return "".join(texts)


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())


def main() -> None:
    from sqa_jax.batches.config_data import config_images, load_config_problems, training_problems
    from sqa_jax.batches.dataset import build_or_reuse
    from sqa_jax.checkpoints.load import student_config
    from sqa_jax.checkpoints.tokenizer import load_tokenizer

    config = flags.FLAGS.config
    path, revision = config.student.path, config.student.revision
    tokenizer, student = load_tokenizer(path, revision), student_config(path, revision, config.student.max_image_tokens)
    problems = load_config_problems(config)
    images = config_images(config, student, training_problems(config, problems))
    dataset, reused = build_or_reuse(config, tokenizer, problems, images)
    print(describe(dataset, reused, tokenizer, student.vocab_size))
    if images is not None and images.failed:
        print(f"  {images.failure_summary()}")


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    cli.run(main)
