"""Trains an adapter (or the whole student) on a pre-tokenized distillation dataset.

Reads:  the student and the questions that the configuration names; builds the dataset first if there is none
        with the configuration's fingerprint.
Writes: WORKDIR/checkpoints/{last,best}, WORKDIR/metrics.jsonl, WORKDIR/tensorboard/, WORKDIR/config.json, and
        WORKDIR/train.json when it is done, beside WORKDIR/prompt.json with the words that are nearest to a trained
        soft prompt. The same command continues an interrupted run where it stopped,
        bit for bit; SIGTERM and Ctrl-C save first.

Example:
  python -m sqa_jax.train --config configs/quickstart.py --workdir runs/quickstart --config.optimizer.learning_rate=5e-4
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError

if TYPE_CHECKING:
    from sqa_jax.runtime import Runtime


def train(config, workdir: str, runtime: Runtime | None = None) -> dict[str, Any]:
    """Runs (or continues) a training run; returns what WORKDIR/train.json holds, and whether a signal "stopped" it.

    Args:
      runtime: the loaded student, for many runs of one; None loads what the configuration names.

    Raises:
      UserError: the configuration, the data, the workdir or the disk does not allow it, or the loss is no
        longer finite.
    """
    import jax
    import numpy as np

    from sqa_jax import adapters
    from sqa_jax.adapters.nearest import report_nearest_tokens
    from sqa_jax.adapters.peft_read import resolve_peft_adapter
    from sqa_jax.batches.dataset import build_or_reuse, load_config_problems, training_problems
    from sqa_jax.batches.loader import make_loader, packed_rows, steps_of
    from sqa_jax.files import write_json
    from sqa_jax.inference.features import picture_rows
    from sqa_jax.parallel.mesh import check_rows, local_rows, place_rows
    from sqa_jax.parallel.processes import Votes, is_main, main_first
    from sqa_jax.parallel.rules import shardings
    from sqa_jax.runtime import build_runtime
    from sqa_jax.signals import StopSignal
    from sqa_jax.training.checkpoint import Checkpoints, abstract
    from sqa_jax.training.optimizer import make_optimizer
    from sqa_jax.training.reporter import Reporter
    from sqa_jax.training.step import compile_step, init_state, make_step
    from sqa_jax.training.validate import Validator
    from sqa_jax.training.workdir import bind_config, open_workdir

    if not workdir:
        raise UserError("--workdir is needed: where the run's checkpoints and metrics are kept")
    config, given = resolve_peft_adapter(config)
    adapters.check_methods(config.adapter.methods)
    root = open_workdir(workdir)

    # ---- student and data
    runtime = runtime or build_runtime(config)
    mesh, student, decoder = runtime
    check_rows(config.train.batch_rows, mesh, "train.batch_rows")
    problems = load_config_problems(config)
    seen = picture_rows(config, runtime, training_problems(config, problems))
    with main_first():
        dataset, reused = build_or_reuse(config, student.tokenizer, problems, seen and seen.pictures)
    virtual = adapters.soft_prompt_tokens(config.adapter)
    rows = packed_rows(dataset, config, student.tokenizer.pad_token_id, virtual, student.config.prefix_lm, seen)
    rows_per_step = config.train.batch_rows * config.train.accumulate
    steps = steps_of(config, rows)
    own = local_rows(mesh, config.train.batch_rows)
    loader = make_loader(rows, config.train.batch_rows, config.train.accumulate, own)
    with main_first():
        made_of = {"student": student.fingerprint, "dataset": dataset.manifest["fingerprint"]}
        bind_config(root, config, made_of if given is None else {**made_of, "peft": given.fingerprint})

    # ---- state, in its shards
    optimizer = make_optimizer(config.optimizer, steps)
    base, first_tree = student.params, None if given is None else given.tree
    words = adapters.prompt_text_tokens(config.adapter, student.tokenizer)

    def new_state(base, tree):
        new = tree or adapters.init_adapter(config.adapter, student.config, base, config.seed, words)
        return init_state(new, optimizer)

    shape = jax.eval_shape(new_state, base, first_tree)
    placed = shardings(shape, mesh)
    checkpoints = Checkpoints(root / "checkpoints")
    restored = checkpoints.restore(abstract(shape, placed))
    if restored is None:
        state, best_loss = jax.jit(new_state, out_shardings=placed)(base, first_tree), None
    else:
        state, best_loss = restored[0], restored[1]["best_loss"]
        loader.set_state(restored[1]["loader"])
    if "full" in config.adapter.methods:
        base = {}  # the trained tree is the model, and nothing else needs the weights that it started from
        runtime = runtime._replace(student=dataclasses.replace(student, params=base))
    first = int(state.step)

    # ---- the compiled step, and what looks at it
    step_fn = compile_step(make_step(config.adapter, decoder, optimizer, config.seed), shape, base, mesh)
    validation = problems.split(config.eval.val_split)[: config.eval.val_limit or None]
    validator = Validator(config, runtime, validation, virtual, picture_rows(config, runtime, validation))
    report = Reporter(root, first, steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(shape.adapter))
    report.say(
        f"{student.name}: {'+'.join(config.adapter.methods)}, {size:,} trained parameters; {len(rows.pids)} rows "
        f"({'reused' if reused else 'built'} {dataset.path}), {100 * rows.real_tokens():.1f} % real tokens; "
        f"steps {first} → {steps} on {mesh.size} {jax.devices()[0].platform} device{'s' * (mesh.size > 1)}"
        + f" of {jax.process_count()} processes"
        * (jax.process_count() > 1)
    )

    def settle(pending) -> bool:
        """Waits for a step's metrics, refuses what is not finite, reports the rest; True asks all processes to stop."""
        if pending is None:
            return False
        number, metrics, stops = pending
        per_row = np.asarray(metrics.pop("row_losses")).reshape(-1)
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, (values["loss"], values["grad_norm"]))):
            report.close()
            checkpoints.finish()
            bad = np.flatnonzero(~np.isfinite(per_row))
            bad = bad if bad.size else np.arange(per_row.size)
            pids = [pid for row in bad for pid in rows.pids_of((number - 1) * rows_per_step + int(row))]
            raise UserError(
                f"{root}: step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}; questions "
                f"{', '.join(pids[:20])}{' …' if len(pids) > 20 else ''}; the last checkpoint is from before: lower "
                "config.optimizer.learning_rate or look at these questions, and use another --workdir"
            )
        report.step(number, values, number % max(1, config.train.log_every) == 0 or number == steps)
        return bool(stops)

    def validate(step: int) -> None:
        nonlocal best_loss
        metrics = validator(state.adapter, base)
        report.write(step, metrics)
        better = best_loss is None or metrics["val_loss"] < best_loss
        if better:
            best_loss = metrics["val_loss"]
            checkpoints.save_best(step, state.adapter)
        report.say(
            f"step {step}: "
            + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            + (" (best so far)" if better else "")
        )

    # ---- the loop
    if first == 0 and restored is None:
        validate(0)
    votes, asked, pending = Votes(), False, None
    with StopSignal() as stop:
        for number in range(first + 1, steps + 1):
            batch = place_rows(next(loader), mesh, config.train.batch_rows, own, leading=1)
            state, metrics = step_fn(state, base, batch)
            asked |= settle(pending)  # of the step before, while this one runs
            asked |= votes.alone and stop.asked
            pending = (number, metrics, votes.any_process(stop.asked))
            last = number == steps or asked or number - first == config.train.stop_after
            evaluate = number == steps or (config.train.eval_every and number % config.train.eval_every == 0)
            if last or evaluate or (config.train.save_every and number % config.train.save_every == 0):
                asked |= settle(pending)
                pending = None
                if evaluate:
                    validate(number)
                report.flush()
                checkpoints.save(number, state, loader.get_state(), best_loss)
            if last or asked:
                break
    checkpoints.close()
    report.close()

    # ---- the end
    done = int(state.step)
    result = {
        "step": done,
        "steps": steps,
        "finished": done == steps,
        "best_val_loss": best_loss,
        "trained_parameters": size,
    }
    if done == steps and "prompt" in state.adapter:
        prompt, table = state.adapter["prompt"]["embedding"], base["embed_tokens"]["embedding"]
        report_nearest_tokens(root / "prompt.json", prompt, table, student.tokenizer, mesh)
    if not is_main():
        pass
    elif done == steps:
        write_json(root / "train.json", result)
        print(f"trained {steps} steps; checkpoints, metrics and TensorBoard events are in {root}")
    else:
        why = (stop.name or "a signal to another process") if asked else "config.train.stop_after"
        print(f"stopped at step {done} of {steps} ({why}), saved; the same command continues")
    return {**result, "stopped": asked or stop.asked}


def main() -> None:
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    cli.define_processes()
    cli.run(main)
