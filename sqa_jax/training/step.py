"""The optimizer step with gradient accumulation, as a pure function, and its jit with explicit shardings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from sqa_jax.batches.batch import Batch
from sqa_jax.models.api import StudentModel
from sqa_jax.parallel.mesh import batch_sharding, replicated
from sqa_jax.parallel.rules import shardings
from sqa_jax.training.loss import row_losses
from sqa_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """What training updates; the frozen base is not part of it.

    Attributes:
      step: number of steps done, int32 scalar.
      adapter: the trained parameters, float32.
      optimizer: optax's state for them.
    """

    step: jax.Array
    adapter: Any
    optimizer: Any


def init_state(adapter: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), adapter, optimizer.init(adapter))


def make_step(settings, decoder: StudentModel, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """`step(state, base, batch) -> (state, metrics)`.

    Gradient accumulation: the batch's arrays are [A, B, …], A micro-batches. Gradients of *summed* losses are added
    over them and divided once by the number of target tokens of the step, which is exactly the gradient of the large
    batch, however the targets are distributed.

    Metrics: loss (nats per target token), tokens (without padding), targets, grad_norm, adapter_norm, and row_losses
    [A, B], which locate a loss that is not finite.
    """

    def step(state: TrainState, base: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        # Dropout is a function of (seed, step, micro-batch), so that a resumed run draws the same.
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def micro_loss(adapter, micro, index):
            dropout = jax.random.fold_in(key, index) if decoder.lora_dropout else None
            losses = row_losses(settings, decoder, adapter, base, micro, dropout)
            return losses.sum(), losses

        def accumulate(gradient, inputs):
            micro, index = inputs
            (_, losses), update = jax.value_and_grad(micro_loss, has_aux=True)(state.adapter, micro, index)
            return jax.tree.map(jnp.add, gradient, update), losses

        zeros = jax.tree.map(jnp.zeros_like, state.adapter)
        count = batch.tokens.shape[0]
        gradient, losses = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(count)))
        targets = batch.target_mask.sum()
        gradient = jax.tree.map(lambda g: g / targets, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        metrics = {
            "loss": losses.sum() / targets,
            "tokens": (batch.segments > 0).sum(),
            "targets": targets,
            "grad_norm": optax.global_norm(gradient),
            "adapter_norm": optax.global_norm(adapter),
            "row_losses": losses,
        }
        return TrainState(state.step + 1, adapter, optimizer_state), metrics

    return step


def compile_step(step: Callable, state: Any, base: Any, mesh: Mesh):
    """Jits the step with shardings from the rules; the state is donated.

    Args:
      state, base: trees of arrays or of their shapes.
    """
    placed = shardings(state, mesh)
    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(placed, shardings(base, mesh), batch_sharding(mesh, leading=1)),
        out_shardings=(placed, everywhere),
        donate_argnums=0,
    )


def training_step(config, decoder: StudentModel, steps: int, state: TrainState, base: Any, mesh: Mesh):
    """The compiled step of a run; runs with equal settings and shapes, as in a study, share one, which is traced once.

    Args:
      steps: optimizer steps of the whole run.
      state, base: trees of arrays or of their shapes.
    """
    leaves, structure = jax.tree.flatten((state, base))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    adapter, optimizer = FrozenConfigDict(config.adapter), FrozenConfigDict(config.optimizer)
    seed = config.seed if decoder.lora_dropout else 0  # only dropout draws numbers
    return _shared_step(adapter, optimizer, decoder, steps, seed, mesh, structure, shapes)


@functools.lru_cache(maxsize=4)
def _shared_step(
    adapter_config, optimizer_config, decoder: StudentModel, steps: int, seed: int, mesh: Mesh, structure, shapes
):
    state, base = jax.tree.unflatten(structure, shapes)
    step = make_step(adapter_config, decoder, make_optimizer(optimizer_config, steps), seed)
    return compile_step(step, state, base, mesh)
