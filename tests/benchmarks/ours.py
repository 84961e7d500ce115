"""The work with this package: the building blocks of its verbs, composed as the verbs compose them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sqa_jax.batches.batch import Batch
from sqa_jax.batches.config_data import load_config_problems
from sqa_jax.batches.dataset import build_or_reuse
from sqa_jax.batches.loader import make_loader, pack_dataset, training_steps
from sqa_jax.inference.answer import GenerativeAnswerer, LikelihoodAnswerer
from sqa_jax.parallel.mesh import place_rows
from sqa_jax.runtime import Runtime, build_runtime
from sqa_jax.training.optimizer import make_optimizer
from sqa_jax.training.step import TrainState, compile_step, init_state, make_step
from tests.benchmarks.process import WARM, host_peak, serve
from tests.benchmarks.work import adapter_of, questions_of, settings_of


class Training(NamedTuple):
    """The inputs of the training loop."""

    config: Any
    runtime: Runtime
    optimizer: Any
    state: TrainState
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]
    batches: Iterator[Batch]  # endless
    steps: int


def begin(root: Path) -> Training:
    """Everything that the training verb does before its loop."""
    config, runtime, adapter = _begin(root)
    dataset, _ = build_or_reuse(config, runtime.student.tokenizer, load_config_problems(config))
    rows = pack_dataset(dataset, config, runtime.student.tokenizer.pad_token_id)
    steps = training_steps(config, rows)
    optimizer = make_optimizer(config.optimizer, steps)
    state = init_state(adapter, optimizer)
    step = compile_step(
        make_step(config.adapter, runtime.decoder, optimizer, config.seed), state, runtime.student.params, runtime.mesh
    )
    batches = (
        place_rows(batch, runtime.mesh, config.train.batch_rows, leading=1)
        for batch in make_loader(rows, config.train.batch_rows, config.train.accumulate)
    )
    return Training(config, runtime, optimizer, state, step, batches, steps)


def train(root: Path, started: float) -> dict[str, Any]:
    """The verb's loop without validation and checkpoints: metrics are read while the next step runs."""
    training = begin(root)
    state, base = training.state, training.runtime.student.params
    losses, norms, tokens, pending = [], [], 0, None

    def settle(metrics) -> None:
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))

    for number in range(1, training.steps + 1):
        state, metrics = training.step(state, base, next(training.batches))
        if pending is not None:
            settle(pending)
        pending = metrics
        if number == 1:
            jax.block_until_ready(state)
            first = time.time() - started
        if number == WARM:
            jax.block_until_ready(state)
            clock = time.perf_counter()
        elif number > WARM:
            tokens += metrics["tokens"]
    settle(pending)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - clock
    return {
        "rate": int(tokens) / seconds,
        "first_step_s": first,
        "peak_bytes": _peak(),
        "losses": losses,
        "gradient_norms": norms,
    }


def loader(root: Path, _: float) -> dict[str, Any]:
    """Seconds of a step with the loader, and with one batch that is on the device already, alternating."""
    training = begin(root)
    state, base = training.state, training.runtime.student.params
    ready = next(training.batches)
    seconds: dict[str, list[float]] = {"loaded": [], "ready": [], "waited": []}
    for number in range(WARM + 2 * training.steps):
        clock = time.perf_counter()
        batch = next(training.batches) if number % 2 else ready
        waited = time.perf_counter() - clock
        state, metrics = training.step(state, base, batch)
        jax.block_until_ready((state, metrics))
        if number >= WARM:
            seconds["loaded" if number % 2 else "ready"].append(time.perf_counter() - clock)
            if number % 2:
                seconds["waited"].append(waited)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def likelihood(root: Path, _: float) -> dict[str, Any]:
    """`config.eval.mode=likelihood`; the first run compiles, the second is measured."""
    config, runtime, adapter = _begin(root)
    questions, ask = questions_of(config), LikelihoodAnswerer(config, runtime)
    for _ in range(2):
        clock = time.perf_counter()
        found = {one.index: one.answer for one in ask(adapter, runtime.student.params, questions)}
        seconds = time.perf_counter() - clock
    answers = [found[index] for index in range(len(questions))]
    return {"rate": len(answers) / seconds, "peak_bytes": _peak(), "answers": answers}


def generate(root: Path, _: float) -> dict[str, Any]:
    """`config.eval.mode=generate`; the first run compiles, the second is measured."""
    config, runtime, adapter = _begin(root)
    questions, ask = questions_of(config), GenerativeAnswerer(config, runtime)
    for _ in range(2):
        clock = time.perf_counter()
        found = {one.index: one for one in ask(adapter, runtime.student.params, questions)}
        seconds = time.perf_counter() - clock
    written = sum(min(one.generated_tokens, config.eval.max_new_tokens) for one in found.values())
    texts = [found[index].text for index in range(len(questions))]
    return {"rate": written / seconds, "peak_bytes": _peak(), "texts": texts}


def _begin(root: Path) -> tuple[Any, Runtime, Any]:
    """Configuration, student and adapter."""
    config, flags = settings_of(root)
    config.student.path = str(root / "student")
    runtime = build_runtime(config)
    return config, runtime, adapter_of(config, flags["run"], runtime)


def _peak() -> int:
    stats = jax.local_devices()[0].memory_stats()  # CPUs have none
    return stats["peak_bytes_in_use"] if stats else host_peak()


if __name__ == "__main__":
    serve({task.__name__: task for task in (train, loader, likelihood, generate)})
