"""AdamW with learning-rate warm-up and decay, gradient clipping, and weight decay on matrices only."""

from __future__ import annotations

import re

import jax
import numpy as np
import optax

from sqa_jax.errors import UserError
from sqa_jax.parallel.rules import path_name

_NO_DECAY = re.compile(r"(scale|bias)$")


def make_schedule(settings, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then cosine, linear or constant to `final_ratio` of the peak.

    Args:
      settings: `config.optimizer`.
      steps: optimizer steps of the whole run.

    Raises:
      UserError: the schedule's name is not known.
    """
    peak, warmup = settings.learning_rate, round(settings.warmup_ratio * steps)
    final, rest = peak * settings.final_ratio, max(1, steps - warmup)
    if settings.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=settings.final_ratio)
    elif settings.schedule == "linear":
        decay = optax.linear_schedule(peak, final, rest)
    elif settings.schedule == "constant":
        decay = optax.constant_schedule(peak)
    else:
        raise UserError(f"config.optimizer.schedule is {settings.schedule!r}; choose cosine, linear or constant")
    # Warm-up starts above zero, so that the first step trains, and reaches the peak at step `warmup`.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), decay], [warmup])


def learning_rates(settings, steps: int) -> np.ndarray:
    """The learning rate of every step of a run, [steps] float32; step k of 1 … `steps` is at index k - 1."""
    return np.asarray(jax.jit(jax.vmap(make_schedule(settings, steps)))(np.arange(steps)))


def make_optimizer(settings, steps: int) -> optax.GradientTransformation:
    """Clip by global norm → Adam → decoupled weight decay on matrices → schedule (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    def decayed(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: not _NO_DECAY.search(path_name(path)), tree)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(make_schedule(settings, steps)),
    )
