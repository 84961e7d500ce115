"""Plans a run on a TPU slice without having one: compiles its very programs for it, and counts.

Reads:  the configuration, the shape of its student (no weights), and its dataset, which is built if it is not there.
Writes: a table on stdout, or JSON with everything (--format json).

Needs the TPU's compiler, which runs on any x86 machine: pip install -e '.[tpu-plan]'. A program takes it a minute or two.

Examples:
  python -m sqa_jax.plan --config configs/scienceqa.py --config.data.path=DIR --topology v5e:2x2 \\
      --config.train.row_length=1024 --config.train.batch_rows=32
  python -m sqa_jax.plan --config.student.path=random:smollm2-1.7b --topology v5e:4x4 --sweep
  python -m sqa_jax.plan --config.student.path=random:llama-3-8b --topology v5e:16x16 --slices 2 --config.mesh.fsdp=256
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from sqa_jax import cli


def make_plan(config: Any, name: str, slices: int, programs: tuple[str, ...]) -> dict[str, Any]:
    """The plan of a configuration's programs on a topology.

    Args:
      programs: any of "train", "generate".

    Returns:
      topology, slices, chips, chip, student, methods, and each program's plan under its name.

    Raises:
      UserError: there is no such topology, libtpu is missing, or configuration and slice do not fit each other.
    """
    from sqa_jax.plan.programs import data_of
    from sqa_jax.plan.report import plan, plan_generation

    about, where = _about(config, name, slices)
    if "train" in programs:
        about["train"] = plan(config, *where, data_of(config, where[0]))
    if "generate" in programs:
        about["generate"] = plan_generation(config, *where)
    return about


def make_sweep(config: Any, name: str, slices: int, most: int, rows: int) -> dict[str, Any]:
    """As `make_plan`, with a sweep of the training step under "sweep": see `sqa_jax.plan.sweep`."""
    from sqa_jax.plan.programs import data_of
    from sqa_jax.plan.sweep import sweep

    about, where = _about(config, name, slices)
    return {**about, "sweep": sweep(config, *where, data_of(config, where[0]), most, rows)}


def _about(config: Any, name: str, slices: int) -> tuple[dict[str, Any], tuple]:
    from sqa_jax.checkpoints.load import student_config
    from sqa_jax.parallel.chips import topology

    kind, devices = topology(name, slices)
    about = {
        "topology": name, "slices": slices, "chips": len(devices), "chip": kind,
        "student": config.student.path, "methods": list(config.adapter.methods),
    }  # fmt: skip
    return about, (
        student_config(config.student.path, config.student.revision, config.student.max_image_tokens),
        kind,
        devices,
    )


def main() -> None:
    FLAGS = flags.FLAGS
    from sqa_jax.parallel.chips import use_compiler_only

    use_compiler_only()
    from sqa_jax.adapters.peft_read import resolve_peft_adapter

    where = resolve_peft_adapter(FLAGS.config)[0], FLAGS.topology, FLAGS.slices
    if FLAGS.sweep:
        result = make_sweep(*where, FLAGS.compile_at_most, FLAGS.rows)
    else:
        result = make_plan(*where, ("train", "generate") if FLAGS.program == "both" else (FLAGS.program,))
    if FLAGS.format == "json":
        print(json.dumps(result, indent=2))
        return
    from sqa_jax.plan import table

    times = f"{FLAGS.slices} × " if FLAGS.slices > 1 else ""
    print(f"{result['student']} ({'+'.join(result['methods'])}) on {times}{FLAGS.topology}, {result['chips']} chips")
    if FLAGS.sweep:
        print("\n" + table.many(result["sweep"], FLAGS.format == "markdown"))
    for name, written in (("train", table.training), ("generate", table.generation)):
        if name in result:
            print("\n" + written(result[name]))


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    flags.DEFINE_string("topology", "v5e:4x4", "The slice, as v5e:4x4 or v5p:8x8x8.")
    flags.DEFINE_integer("slices", 1, "How many of them, joined by the data center's network.", lower_bound=1)
    flags.DEFINE_enum("program", "both", ["train", "generate", "both"], "What to compile, where it is no sweep.")
    flags.DEFINE_bool("sweep", False, "Walk shapes of the mesh and sizes of the micro-batch, and rank them.")
    flags.DEFINE_integer("compile_at_most", 8, "Programs that a sweep compiles, the most promising.", lower_bound=1)
    flags.DEFINE_integer("rows", 0, "Rows of one step that a sweep keeps to, by accumulating; 0 is any.", lower_bound=0)
    flags.DEFINE_enum("format", "table", ["table", "markdown", "json"], "How to write the result.")
    cli.run(main)
