"""Answers a split's questions with a student that may call tools: by several policies, each at its cost.

Reads:  the questions and the student that --config names; with --config.agent.adapter=RUN that training's adapter,
        recipe and student settings.
Writes: WORKDIR/<split>/<policy>/predictions.jsonl, one row a question with its whole dialogue, and metrics.json;
        WORKDIR/<split>/results.json, report.md and plots/, the comparison of all policies; WORKDIR/calibration.json.
        Stopped half-way, it goes on with the questions that are missing.
        With --traces: WORKDIR/traces.jsonl, tool dialogues of the training questions to learn from.

Examples:
  python -m sqa_jax.agent --config configs/agent.py --split val --workdir runs/agent
  python -m sqa_jax.agent --split val --workdir runs/agent --show 17
  python -m sqa_jax.agent --traces --workdir runs/agent
  python -m sqa_jax.train --config configs/agent.py --config.data.traces="('runs/agent/traces.jsonl',)"
      --workdir runs/agent-lora
  python -m sqa_jax.agent --split val --workdir runs/agent-trained --config.agent.adapter=runs/agent-lora
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_write, local_path, read_jsonl, write_json


def agent(config, workdir: str, split: str) -> dict[str, Any]:
    """Runs every policy and returns what results.json holds.

    Raises:
      UserError: a setting, the data, the student or the disk does not allow it.
    """
    from sqa_jax.agent.report import write_report
    from sqa_jax.agent.run import PolicyRunner, policy_names
    from sqa_jax.agent.summary import summarize

    names = policy_names(config)
    runner = PolicyRunner(config, _root(workdir))
    problems = runner.problem_set.split(split)[: config.eval.limit or None]
    metrics = {name: runner.run_policy(name, problems, split) for name in names}
    folder = runner.root / split
    results = summarize(runner, problems, split, metrics)
    write_json(folder / "results.json", results)
    write_report(results, folder)
    return results


def write_traces(config, workdir: str) -> Path:
    """Writes WORKDIR/traces.jsonl, of the training questions.

    Raises:
      UserError: as `agent`.
    """
    from sqa_jax.agent.run import PolicyRunner

    runner = PolicyRunner(config, _root(workdir))
    file = runner.root / "traces.jsonl"
    with atomic_write(file) as out:
        for trace in runner.traces():
            out.write(json.dumps(trace, ensure_ascii=False) + "\n")
    return file


def show(config, workdir: str, split: str, pid: str) -> str:
    """One question's dialogue under every policy that answered it, readable.

    Raises:
      UserError: no policy answered it.
    """
    from sqa_jax.agent.report import dialogue_text
    from sqa_jax.batches.config_data import load_config_problems

    problem = load_config_problems(config).all().get(pid)
    if problem is None:
        raise UserError(f"--show {pid}: there is no such question in the data that --config names")
    shown = []
    for file in sorted((_root(workdir) / split).glob("*/predictions.jsonl")):
        for row in read_jsonl(file, "predictions"):
            if row["pid"] == pid:
                shown.append(dialogue_text(problem, row, file.parent.name))
    if not shown:
        raise UserError(f"--show {pid}: no policy in {workdir}/{split} has answered it; run without --show first")
    return "\n\n".join(shown)


def _root(workdir: str) -> Path:
    if not workdir:
        raise UserError("--workdir is needed: where the dialogues are kept")
    return local_path(workdir, "--workdir")


def config_with_adapter(config):
    """The configuration with recipe, adapter and student of the training that `config.agent.adapter` names."""
    from sqa_jax.training.workdir import read_saved

    if not config.agent.adapter:
        return config
    file = Path(config.agent.adapter) / "config.json"
    if not file.exists():
        raise UserError(
            f"config.agent.adapter: {config.agent.adapter} has no config.json; name the workdir of a training"
        )
    trained = read_saved(file)["config"]
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for part in ("recipe", "adapter", "student"):
            config[part].update(trained[part])
    return config


def main() -> None:
    FLAGS = flags.FLAGS
    config = config_with_adapter(FLAGS.config)
    split = FLAGS.split or config.eval.split
    if FLAGS.show:
        print(show(config, FLAGS.workdir, split, FLAGS.show))
    elif FLAGS.traces:
        print(f"traces are in {write_traces(config, FLAGS.workdir)}")
    else:
        from sqa_jax.agent.report import table

        results = agent(config, FLAGS.workdir, split)
        print(table(results))
        print(f"results.json, report.md and plots are in {FLAGS.workdir}/{split}")


if __name__ == "__main__":
    cli.define_config("configs/agent.py")
    flags.DEFINE_string("split", "", "Which questions; the default is config.eval.split.")
    flags.DEFINE_string("show", "", "Prints this question's dialogues, and does nothing else.")
    flags.DEFINE_bool("traces", False, "Writes tool dialogues of the training questions to learn from instead.")
    cli.run(main)
