"""Train states and adapters from checkpoints, restored into their shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from sqa_jax import adapters
from sqa_jax.adapters.peft_read import PeftAdapter
from sqa_jax.errors import UserError
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.parallel.rules import shardings
from sqa_jax.runtime import Runtime
from sqa_jax.training.checkpoint import Checkpoints, abstract
from sqa_jax.training.optimizer import make_optimizer
from sqa_jax.training.step import TrainState, init_state


class Position(NamedTuple):
    """Where an interrupted run continues, besides its train state.

    Attributes:
      loader: the loader's state.
      best_loss: the lowest validation loss so far, None before the first validation.
    """

    loader: dict[str, Any]
    best_loss: float | None


def init_or_restore(
    config,
    runtime: Runtime,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    peft: PeftAdapter | None = None,
) -> tuple[TrainState, Position | None]:
    """The last checkpoint's train state, or a new one: sharded over the mesh either way.

    Args:
      peft: the adapter to start from, instead of a newly initialized one.

    Returns:
      (state, position); the position of a new run is None.
    """
    student = runtime.student
    tree = None if peft is None else peft.tree
    prompt = adapters.prompt_text_tokens(config.adapter, student.tokenizer)

    def new_state(base: ParamTree, tree: ParamTree | None) -> TrainState:
        adapter = tree or adapters.init_adapter(config.adapter, student.config, base, config.seed, prompt)
        return init_state(adapter, optimizer)

    shapes = jax.eval_shape(new_state, student.params, tree)
    placed = shardings(shapes, runtime.mesh)
    restored = checkpoints.restore(abstract(shapes, placed))
    if restored is None:
        return jax.jit(new_state, out_shardings=placed)(student.params, tree), None
    state, extra = restored
    return state, Position(extra["loader"], extra["best_loss"])


def check_checkpoint(config, root: Path) -> None:
    """Checks, before anything is loaded, that `config.eval.checkpoint` can be in ROOT.

    Raises:
      UserError: the value is unknown, or ROOT has no checkpoints.
    """
    if config.eval.checkpoint not in ("best", "last", "none"):
        raise UserError(f"config.eval.checkpoint is {config.eval.checkpoint!r}; choose best, last or none")
    if config.eval.checkpoint != "none" and not (root / "checkpoints").is_dir():
        raise UserError(
            f"{root}: has no checkpoints; train first, or use the bare student, or config.adapter.peft on it, with "
            "--config.eval.checkpoint=none"
        )


def restore_adapter(config, root: Path, runtime: Runtime, peft: PeftAdapter | None = None) -> tuple[int | None, Any]:
    """(step, adapter) of the checkpoint of ROOT that `config.eval.checkpoint` names.

    For "none": (None, the PEFT adapter), or (None, {}) for the student without an adapter.

    Raises:
      UserError: there is no such checkpoint.
    """
    which = config.eval.checkpoint
    if which == "none":
        tree = {} if peft is None else peft.tree
        return None, jax.jit(lambda tree: tree, out_shardings=shardings(tree, runtime.mesh))(tree)

    prompt = adapters.prompt_text_tokens(config.adapter, runtime.student.tokenizer)

    def new(base):
        adapter = adapters.init_adapter(config.adapter, runtime.student.config, base, config.seed, prompt)
        return adapter if which == "best" else init_state(adapter, make_optimizer(config.optimizer, 1))

    shape = jax.eval_shape(new, runtime.student.params)
    checkpoints = Checkpoints(root / "checkpoints")
    found = checkpoints.restore_adapter(which, abstract(shape, shardings(shape, runtime.mesh)))
    checkpoints.close()
    if found is None:
        raise UserError(
            f"{root}/checkpoints: holds no {which} checkpoint yet; train longer, or choose --config.eval.checkpoint"
        )
    return found
