"""Where a training step's time goes: its parts alone, against the machine's rate of matrix products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sqa_jax.files import read_json
from sqa_jax.models.flops import forward_flops, training_flops
from sqa_jax.training.loss import row_losses
from tests.benchmarks.ours import begin
from tests.benchmarks.process import PRODUCTS, seconds_of, serve


def product_flops(products: list[list[int]]) -> int:
    """FLOPs of [times, N, in, out]: that many products [N, in] · [in, out] each."""
    return sum(2 * times * n * width_in * width_out for times, n, width_in, width_out in products)


def products(root: Path, _: float) -> dict[str, float]:
    """The forward pass's matrix products with weights, and nothing else, in XLA."""
    work = read_json(root / "work.json", "the work of this benchmark")
    multiply, total, key = jax.jit(jnp.matmul), 0.0, jax.random.key(0)
    for times, n, width_in, width_out in work["products"]:
        x, w = (jax.random.normal(key, shape, work["dtype"]) for shape in ((n, width_in), (width_in, width_out)))

        def multiplied(x=x, w=w) -> None:
            jax.block_until_ready([multiply(x, w) for _ in range(PRODUCTS)])

        total += times * seconds_of(multiplied) / PRODUCTS
    return {"seconds": total, "flops": product_flops(work["products"])}


def account(root: Path, _: float) -> dict[str, Any]:
    """Seconds and model FLOPs of a micro-batch's forward pass, of forward and backward, and of a whole step.

    FLOPs count real tokens only, so padding is among what makes a part slower than the products.
    """
    training = begin(root)
    config, runtime, state = training.config, training.runtime, training.state
    base, decoder, batch = runtime.student.params, runtime.decoder, next(training.batches)
    micro = jax.tree.map(lambda array: array[0], batch)

    def loss(adapter, base, micro):
        return row_losses(config.adapter, decoder, adapter, base, micro, None).sum()

    def update(gradient, state):
        updates, optimizer = training.optimizer.update(gradient, state.optimizer, state.adapter)
        return optax.apply_updates(state.adapter, updates), optimizer

    forward, both, update = jax.jit(loss), jax.jit(jax.value_and_grad(loss)), jax.jit(update)
    gradient = both(state.adapter, base, micro)[1]
    seconds = {
        "forward": seconds_of(lambda: jax.block_until_ready(forward(state.adapter, base, micro))),
        "forward and backward": seconds_of(lambda: jax.block_until_ready(both(state.adapter, base, micro))),
        "optimizer": seconds_of(lambda: jax.block_until_ready(update(gradient, state))),
    }

    def whole() -> None:
        nonlocal state  # each step donates the state before it
        state = jax.block_until_ready(training.step(state, base, batch)[0])

    seconds["whole step"] = seconds_of(whole)

    def counts(part) -> tuple[int, float, int]:
        """Real tokens, mean number of keys that one attends to, and targets."""
        real = np.asarray(part.segments) > 0
        return int(real.sum()), float(np.asarray(part.positions)[real].mean() + 1), int(part.target_mask.sum())

    trained = sum(leaf.size for leaf in jax.tree.leaves(state.adapter))
    methods, student = tuple(config.adapter.methods), runtime.student.config
    tokens = counts(micro)[0]
    flops = {
        "forward": forward_flops(student, *counts(micro)) + 2 * tokens * trained,
        "forward and backward": training_flops(student, methods, trained, *counts(micro)),
        "whole step": training_flops(student, methods, trained, *counts(batch)),
    }
    return {"seconds": seconds, "flops": flops}


if __name__ == "__main__":
    serve({"products": products, "account": account})
