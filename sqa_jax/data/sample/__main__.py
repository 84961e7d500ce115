"""Writes the embedded sample as files, in ScienceQA's directory layout.

Example:
  python -m sqa_jax.data.sample --out datasets/sample
"""

from __future__ import annotations

from absl import flags

from sqa_jax import cli
from sqa_jax.data.sample import generate, write
from sqa_jax.errors import UserError


def main() -> None:
    if not flags.FLAGS.out:
        raise UserError("--out is needed; see --help")
    write(flags.FLAGS.out, flags.FLAGS.seed)
    splits = generate(flags.FLAGS.seed).splits
    print(f"wrote {', '.join(f'{len(pids)} {name}' for name, pids in splits.items())} questions to {flags.FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("out", "", "Directory to make.")
    flags.DEFINE_integer("seed", 0, "Seed of the generator.")
    cli.run(main)
