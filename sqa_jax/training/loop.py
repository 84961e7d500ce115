"""The training loop, from the configuration to the finished run; `python -m sqa_jax.train` is its command.

Read `train` from top to bottom: the run's directory, student and data, state and compiled step, the loop, the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sqa_jax import adapters
from sqa_jax.adapters.nearest import report_nearest_tokens
from sqa_jax.adapters.peft_read import resolve_peft_adapter
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_write, write_json
from sqa_jax.inference.features import image_batcher
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.parallel.mesh import check_rows, place_rows
from sqa_jax.parallel.processes import is_main, main_first
from sqa_jax.runtime import Runtime, build_runtime
from sqa_jax.signals import StopSignal
from sqa_jax.training.checkpoint import BestCheckpoint, Checkpoints
from sqa_jax.training.data import TrainingData, load_data
from sqa_jax.training.optimizer import learning_rates, make_optimizer
from sqa_jax.training.overview import parameter_overview
from sqa_jax.training.pending import NonFiniteLoss, PendingMetrics
from sqa_jax.training.profiler import StepProfiler
from sqa_jax.training.reporter import Reporter
from sqa_jax.training.restore import init_or_restore
from sqa_jax.training.step import TrainState, training_step
from sqa_jax.training.stop import StopVote
from sqa_jax.training.validate import Validator
from sqa_jax.training.workdir import bind_config, open_workdir


def train(config, workdir: str, runtime: Runtime | None = None) -> dict[str, Any]:
    """Runs (or continues) a training run; returns what WORKDIR/train.json holds, and whether a signal "stopped" it.

    Args:
      runtime: the loaded student, for many runs of one; None loads what the configuration names.

    Raises:
      UserError: the configuration, the data, the workdir or the disk does not allow it, or the loss is no
        longer finite.
    """
    # ---- the run's directory and its configuration
    if not workdir:
        raise UserError("--workdir is needed: where the run's checkpoints and metrics are kept")
    config, peft = resolve_peft_adapter(config)
    adapters.check_methods(config.adapter.methods)
    root = open_workdir(workdir)

    # ---- student and data
    runtime = runtime or build_runtime(config)
    check_rows(config.train.batch_rows, runtime.mesh, "train.batch_rows")
    data = load_data(config, runtime)
    with main_first():
        fingerprints = {"student": runtime.student.fingerprint, "dataset": data.dataset.manifest["fingerprint"]}
        bind_config(root, config, fingerprints | ({"peft": peft.fingerprint} if peft else {}))

    # ---- state and compiled step
    optimizer = make_optimizer(config.optimizer, data.steps)
    checkpoints = Checkpoints(root / "checkpoints")
    state, position = init_or_restore(config, runtime, optimizer, checkpoints, peft)
    if position is not None:
        data.loader.set_state(position.loader)
    if "full" in config.adapter.methods:  # the trained tree is the model; nothing needs the initial weights any more
        runtime = runtime._replace(student=dataclasses.replace(runtime.student, params={}))
    step = training_step(config, runtime.decoder, data.steps, state, runtime.student.params, runtime.mesh)

    # ---- the loop
    loop = Loop(config, root, runtime, data, step, state, checkpoints, position and position.best_loss)
    loop.announce()
    if position is None:
        loop.validate(0)
    stop = loop.run()

    # ---- the end
    return _finish(loop, stop)


class Loop:
    """The loop over optimizer steps: dispatches a step, reports the one before, validates and saves in between.

    Args:
      root: the run's directory.
      step: the compiled step, `step(state, base, batch) -> (state, metrics)`.
      state: to start from.
      best_loss: the lowest validation loss before this start.

    Attributes:
      state: after the last dispatched step.
      best: keeps the adapter with the lowest validation loss.
    """

    def __init__(
        self,
        config,
        root: Path,
        runtime: Runtime,
        data: TrainingData,
        step: Callable,
        state: TrainState,
        checkpoints: Checkpoints,
        best_loss: float | None,
    ):
        self.config, self.root, self.runtime, self.data, self.state = config, root, runtime, data, state
        self._step, self._checkpoints = step, checkpoints
        self.base: ParamTree = runtime.student.params
        self.first = int(state.step)
        self.best = BestCheckpoint(checkpoints, best_loss)
        images = image_batcher(config, runtime, data.validation)
        self._validator = Validator(config, runtime, data.validation, data.soft_prompt, images)
        self._report = Reporter(root, self.first, data.steps)
        rows_per_step = config.train.batch_rows * config.train.accumulate
        rates = learning_rates(config.optimizer, data.steps)
        self._pending = PendingMetrics(root, self._report, data.rows, rows_per_step, config.train.log_every, rates)

    def announce(self) -> None:
        """Says what is trained, on what and where; writes WORKDIR/parameters.txt."""
        config, data, mesh = self.config, self.data, self.runtime.mesh
        size = sum(leaf.size for leaf in jax.tree.leaves(self.state.adapter))
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        self._report.say(
            f"{self.runtime.student.name}: {'+'.join(config.adapter.methods)}, {size:,} trained parameters; "
            f"{len(data.rows.pids)} rows ({'reused' if data.reused else 'built'} {data.dataset.path}), "
            f"{100 * data.rows.packing_efficiency():.1f} % real tokens; steps {self.first} → {data.steps} on {mesh.size} "
            f"{jax.devices()[0].platform} device{'s' * (mesh.size > 1)}{processes}"
        )
        table, summary = parameter_overview(self.state.adapter.get("full", self.state.adapter), self.base)
        if is_main():
            with atomic_write(self.root / "parameters.txt") as file:
                file.write(table)
        self._report.say(f"{summary}; each is in {self.root / 'parameters.txt'}")

    def run(self) -> StopVote:
        """Trains to the last step, or to where a signal or `config.train.stop_after` stops it."""
        settings, last_step = self.config.train, self.data.steps
        with StopSignal() as signal, StepProfiler(self.root, self.first, settings.profile_steps) as profiler:
            stop = StopVote(signal)
            for number in range(self.first + 1, last_step + 1):
                profiler.before(number, self.state)
                metrics = self._dispatch(number)
                stop.decide(self._settle())  # metrics and vote of the step before, while this one runs
                self._pending.push(number, metrics, stop.vote())
                last = number == last_step or stop.decided or number - self.first == settings.stop_after
                validate = number == last_step or _is_due(number, settings.eval_every)
                if last or validate or _is_due(number, settings.save_every):
                    stop.decide(self._settle())
                    if validate:
                        self.validate(number)
                    self._report.flush()
                    self._checkpoints.save(number, self.state, self.data.loader.get_state(), self.best.loss)
                if last or stop.decided:
                    break
        self._checkpoints.close()
        self._report.close()
        return stop

    def _dispatch(self, number: int) -> dict[str, jax.Array]:
        """Starts a step on the devices; nothing but its batch is moved there, and that explicitly."""
        rows, local = self.config.train.batch_rows, self.data.local_rows
        batch = place_rows(next(self.data.loader), self.runtime.mesh, rows, local, leading=1)
        with jax.profiler.StepTraceAnnotation("train", step_num=number), jax.transfer_guard("disallow"):
            self.state, metrics = self._step(self.state, self.base, batch)
        return metrics

    def _settle(self) -> bool:
        try:
            return self._pending.settle()
        except NonFiniteLoss:
            self._report.close()
            self._checkpoints.finish()
            raise

    def validate(self, step: int) -> None:
        """Computes and reports the validation metrics; keeps the adapter where they are the best so far."""
        metrics = self._validator(self.state.adapter, self.base)
        self._report.write(step, metrics)
        better = self.best.update(step, metrics["val_loss"], self.state.adapter)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._report.say(f"step {step}: {values}{' (best so far)' if better else ''}")


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _finish(loop: Loop, stop: StopVote) -> dict[str, Any]:
    """Writes WORKDIR/train.json, and a soft prompt's nearest tokens, where the run is done; says how it ended."""
    root, steps, done, adapter = loop.root, loop.data.steps, int(loop.state.step), loop.state.adapter
    result = {
        "step": done,
        "steps": steps,
        "finished": done == steps,
        "best_val_loss": loop.best.loss,
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(adapter)),
    }
    if done == steps and "prompt" in adapter:
        prompt, table = adapter["prompt"]["embedding"], loop.base["embed_tokens"]["embedding"]
        report_nearest_tokens(root / "prompt.json", prompt, table, loop.runtime.student.tokenizer, loop.runtime.mesh)
    if is_main() and done == steps:
        write_json(root / "train.json", result)
        print(f"trained {steps} steps; checkpoints, metrics and TensorBoard events are in {root}")
    elif is_main():
        print(f"stopped at step {done} of {steps} ({stop.reason}), saved; the same command continues")
    return {**result, "stopped": stop.asked}
