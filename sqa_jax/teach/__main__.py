"""Asks a teacher for reasoning, answer and solution of each question, and keeps every reply.

Reads:  the questions that config.data names, of config.teach.split; for a paid teacher its key from the
        environment (GEMINI_API_KEY, OPENAI_API_KEY, or the variable that config.teach.key_env names).
Writes: WORKDIR/ledger.sqlite, every attempt and reply, committed before it counts; WORKDIR/records.jsonl, the
        teacher records that config.data.teacher reads; WORKDIR/teach.json, a summary. The same command asks only
        for what is missing. Ctrl-C or SIGTERM stops once the requests in flight have been answered.

Examples:
  python -m sqa_jax.teach --config configs/teach.py --workdir runs/teach
  GEMINI_API_KEY=… python -m sqa_jax.teach --workdir runs/gemini --config.teach.client=gemini \\
      --config.teach.model=gemini-2.5-flash --config.teach.budget=5
"""

from __future__ import annotations

from absl import flags

from sqa_jax import cli


def main() -> None:
    from sqa_jax.teach.collect import teach

    teach(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.define_config("configs/teach.py")
    cli.run(main)
