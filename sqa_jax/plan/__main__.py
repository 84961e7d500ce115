"""Plans a run on a TPU slice without having one: compiles its programs ahead of time, and analyses their cost.

Reads:  the configuration, the shape of its student (no weights), and its dataset, which is built if missing.
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

from absl import flags

from sqa_jax import cli


def main() -> None:
    from sqa_jax.parallel.chips import use_compiler_only

    use_compiler_only()
    from sqa_jax.adapters.peft_read import resolve_peft_adapter
    from sqa_jax.plan import table
    from sqa_jax.plan.plan import make_plan, make_sweep

    FLAGS = flags.FLAGS
    config = resolve_peft_adapter(FLAGS.config)[0]
    if FLAGS.sweep:
        result = make_sweep(config, FLAGS.topology, FLAGS.slices, FLAGS.compile_at_most, FLAGS.rows)
    else:
        programs = ("train", "generate") if FLAGS.program == "both" else (FLAGS.program,)
        result = make_plan(config, FLAGS.topology, FLAGS.slices, programs)
    if FLAGS.format == "json":
        print(json.dumps(result, indent=2))
        return
    slices = f"{FLAGS.slices} × " if FLAGS.slices > 1 else ""
    print(f"{result['student']} ({'+'.join(result['methods'])}) on {slices}{FLAGS.topology}, {result['chips']} chips")
    if FLAGS.sweep:
        print("\n" + table.sweep(result["sweep"], FLAGS.format == "markdown"))
    for name, table_of in (("train", table.training), ("generate", table.generation)):
        if name in result:
            print("\n" + table_of(result[name]))


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    flags.DEFINE_string("topology", "v5e:4x4", "The slice, as v5e:4x4 or v5p:8x8x8.")
    flags.DEFINE_integer("slices", 1, "Number of slices, connected by the data center's network.", lower_bound=1)
    flags.DEFINE_enum("program", "both", ["train", "generate", "both"], "What to compile, without --sweep.")
    flags.DEFINE_bool("sweep", False, "Sweep over meshes and micro-batch sizes, and rank them.")
    flags.DEFINE_integer(
        "compile_at_most", 8, "Number of programs that a sweep compiles, the most promising first.", lower_bound=1
    )
    flags.DEFINE_integer(
        "rows", 0, "Global batch size of a sweep, kept by gradient accumulation; 0 is any.", lower_bound=0
    )
    flags.DEFINE_enum("format", "table", ["table", "markdown", "json"], "Output format.")
    cli.run(main)
