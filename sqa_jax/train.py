"""Trains an adapter (or the whole student) on a pre-tokenized distillation dataset.

Reads:  the student and the questions that the configuration names; builds the dataset first if there is none
        with the configuration's fingerprint.
Writes: WORKDIR/checkpoints/{last,best}, WORKDIR/metrics.jsonl, WORKDIR/tensorboard/, WORKDIR/config.json,
        WORKDIR/parameters.txt, and WORKDIR/train.json when it is done, beside WORKDIR/prompt.json with the tokens
        nearest to a trained soft prompt. The same command continues an interrupted run where it stopped, bit for
        bit; SIGTERM and Ctrl-C save first. --config.train.profile_steps=N also writes WORKDIR/profile.

Example:
  python -m sqa_jax.train --config configs/quickstart.py --workdir runs/quickstart --config.optimizer.learning_rate=5e-4
"""

from __future__ import annotations

from absl import flags

from sqa_jax import cli


def main() -> None:
    from sqa_jax.training.loop import train

    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    cli.define_processes()
    cli.run(main)
