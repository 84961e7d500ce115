"""Builds the pre-tokenized distillation dataset of a configuration, or finds it built already.

Reads:  the questions and teacher replies that config.data names, the student's tokenizer.
Writes: <config.data.cache>/<fingerprint>/ with Arrow rows and manifest.json. The same configuration makes the
        same fingerprint, and nothing is built twice.

Example:
  python -m sqa_jax.preprocess --config configs/scienceqa.py --config.data.path=/data/ScienceQA \\
      --config.recipe.format=QCM-EA
"""

from __future__ import annotations

from typing import Any

from absl import flags

from sqa_jax import cli


def describe(dataset, reused: bool, tokenizer: Any) -> str:
    """What a person wants to know about a dataset, with its first row decoded."""
    m = dataset.manifest
    lines = [
        f"{'reused' if reused else 'built'} {dataset.path}: {m['rows']} rows of {m['questions']} questions, arm {m['arm']}",
        "  tokens a row:   " + ", ".join(f"{k} {v}" for k, v in m["tokens"].items()),
        "  target tokens:  " + ", ".join(f"{k} {v}" for k, v in m["target_tokens"].items()),
    ]
    lines += [f"  shortened {part}: {cut['rows']} rows, {cut['tokens']} tokens" for part, cut in m["shortened"].items()]
    lines += [
        f"  dropped, {reason}: {cut['rows']} (questions {', '.join(cut['pids'][:3])} …)"
        for reason, cut in m["dropped"].items()
    ]
    tokens, prompt_lengths, _ = dataset.columns()
    first, end = tokens[0], prompt_lengths[0]
    lines += [
        "  first row:",
        _indent(tokenizer.decode(first[:end])),
        "  its target:",
        _indent(tokenizer.decode(first[end:])),
    ]
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())


def main() -> None:
    from sqa_jax.data.dataset import build_or_reuse, load_config_problems
    from sqa_jax.students.tokenizer import load_tokenizer

    config = flags.FLAGS.config
    tokenizer = load_tokenizer(config.student.path, config.student.revision)
    dataset, reused = build_or_reuse(config, tokenizer, load_config_problems(config))
    print(describe(dataset, reused, tokenizer))


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    cli.run(main)
