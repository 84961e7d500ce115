"""Benchmarks this package against Hugging Face transformers + PEFT, on the same work and the same machine.

Both sides get the same weights, adapter, examples of each step, learning rates, options and prompts, and all cores
or the accelerator. Each measurement runs in a process of its own, the two sides alternating; reported are medians,
and the ratios of neighbouring runs with their range. The losses, answers and texts of both are compared, too.

  train        real tokens/s of LoRA training, time to the first step, peak memory; their examples also grouped
               by length, and theirs with the allocator settings of launch/environment.sh, too
  likelihood   questions/s of multiple-choice scoring by log-likelihood, peak memory
  generate     greedy tokens/s, peak memory
  account      where this package's training step spends its time, against the machine's rate of matrix products
  loader       seconds of a step with the loader and with a batch that is on the device already

Reads:  what --config names, and of --run its best adapter. Needs `pip install -e '.[bench]'`.
Writes: WORKDIR/results.json, WORKDIR/results.md, and WORKDIR/runs/ with each process's result and output. What an
        earlier benchmark left there is overwritten.

Examples:
  python -m tests.benchmarks --workdir runs/benchmark --config.data.source=dir --config.data.path=DIR
  python -m tests.benchmarks --workdir runs/account --measure account --measure loader --repeats 1
  python -m tests.benchmarks --workdir runs/gpu --measure train --measure account --config.train.batch_rows=16
      --config.student.path=random:smollm2-1.7b --tokenizer weights/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError
from sqa_jax.files import write_json
from tests.benchmarks.process import measure
from tests.benchmarks.report import disagreement, machine, markdown

OURS, THEIRS = "tests.benchmarks.ours", "tests.benchmarks.theirs"


class Side(NamedTuple):
    """A process to measure; `large_pages`: with the allocator settings of the launch scripts."""

    module: str
    task: str
    large_pages: bool = False


# measurement → side → its process. Theirs runs as its users start it, and trains with our allocator settings, too.
SIDES = {
    "train": {
        "ours": Side(OURS, "train", True),
        "theirs": Side(THEIRS, "train"),
        "theirs_grouped": Side(THEIRS, "train_grouped"),
        "theirs_large_pages": Side(THEIRS, "train", True),
    },
    "likelihood": {"ours": Side(OURS, "likelihood", True), "theirs": Side(THEIRS, "likelihood")},
    "generate": {"ours": Side(OURS, "generate", True), "theirs": Side(THEIRS, "generate")},
    "account": {
        "parts": Side("tests.benchmarks.account", "account", True),
        "ours": Side("tests.benchmarks.account", "products", True),
        "theirs": Side(THEIRS, "products", True),
    },
    "loader": {"ours": Side(OURS, "loader", True)},
}


def benchmark(config, workdir: str, measures: list[str], repeats: int, **other: Any) -> dict[str, Any]:
    """Runs the measurements and returns what WORKDIR/results.json holds.

    Args:
      other: the remaining flags, which `tests.benchmarks.work` reads.

    Raises:
      UserError: a setting is not usable, a process failed, or the two sides' losses differ.
    """
    if not workdir:
        raise UserError("--workdir is needed: where the benchmark's files are kept")
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}; measure once or more")
    root = Path(workdir)
    if root.exists() and any(root.iterdir()) and not (root / "benchmark.json").exists():
        raise UserError(f"--workdir {root}: holds something else than a benchmark; choose a new directory")
    for left in ("student", "adapter", "runs"):
        shutil.rmtree(root / left, ignore_errors=True)
    config.data.cache = str(root / "datasets")
    write_json(root / "benchmark.json", {"config": config.to_dict(), **other})
    results: dict[str, Any] = {"machine": machine(), "config": config.to_dict(), "flags": other}
    results["work"] = measure("tests.benchmarks.work", "prepare", True, root, "prepare")
    shutil.rmtree(root / "compiled", ignore_errors=True)  # the first run compiles anew
    for name in measures:
        results[name] = {side: [] for side in SIDES[name]}
        for repeat in range(repeats):
            for name_of_side, side in SIDES[name].items():
                result = measure(*side, root, f"{name}-{name_of_side}-{repeat + 1}")
                results[name][name_of_side].append(result)
                rate = f": {result['rate']:.4g}/s" if "rate" in result else ""
                print(f"{name}, {name_of_side}, {repeat + 1} of {repeats}{rate}", flush=True)
        write_json(root / "results.json", results)
    text = markdown(results)
    (root / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nresults.json and results.md are in {root}")
    if "train" in results and (wrong := disagreement(results)):
        raise UserError(f"{root}: the two sides do not do the same work: {wrong}")
    return results


def main() -> None:
    given = flags.FLAGS
    benchmark(
        given.config, given.workdir, list(dict.fromkeys(given.measure)), given.repeats,
        tokenizer=given.tokenizer, run=given.run, batch_options=given.batch_options,
    )  # fmt: skip


if __name__ == "__main__":
    cli.define_config("tests/benchmarks/config.py")
    flags.DEFINE_multi_enum("measure", ["train", "likelihood", "generate"], list(SIDES), "What to measure; repeatable.")
    flags.DEFINE_integer("repeats", 3, "Runs of each side.")
    flags.DEFINE_string(
        "run", "", "Workdir of a finished training whose best adapter both use; without it a random one."
    )
    flags.DEFINE_string("tokenizer", "", "A student whose tokenizer is used if the benchmarked one has none.")
    flags.DEFINE_integer("batch_options", 16, "Options that transformers + PEFT score in one batch.")
    cli.run(main)
