"""The adapter of a finished run, or of PEFT's files, in its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from sqa_jax import adapters
from sqa_jax.adapters.peft_read import PeftAdapter
from sqa_jax.errors import UserError
from sqa_jax.parallel.rules import shardings
from sqa_jax.runtime import Runtime
from sqa_jax.training.checkpoint import Checkpoints, abstract
from sqa_jax.training.optimizer import make_optimizer
from sqa_jax.training.step import init_state


def check_checkpoint(config, root: Path) -> None:
    """Checks, before anything is loaded, that `config.eval.checkpoint` can be in ROOT.

    Raises:
      UserError: it is not known, or ROOT is of no training.
    """
    if config.eval.checkpoint not in ("best", "last", "none"):
        raise UserError(f"config.eval.checkpoint is {config.eval.checkpoint!r}; choose best, last or none")
    if config.eval.checkpoint != "none" and not (root / "checkpoints").is_dir():
        raise UserError(
            f"{root}: has no checkpoints; train first, or use the bare student, or config.adapter.peft on it, with "
            "--config.eval.checkpoint=none"
        )


def restore_adapter(config, root: Path, runtime: Runtime, given: PeftAdapter | None = None) -> tuple[int | None, Any]:
    """(step, adapter) of the checkpoint of ROOT that `config.eval.checkpoint` asks for.

    Where that is none: (None, the given adapter), or (None, {}) for the bare student.

    Raises:
      UserError: there is no such checkpoint.
    """
    which = config.eval.checkpoint
    if which == "none":
        tree = {} if given is None else given.tree
        return None, jax.jit(lambda tree: tree, out_shardings=shardings(tree, runtime.mesh))(tree)

    words = adapters.prompt_text_tokens(config.adapter, runtime.student.tokenizer)

    def new(base):
        adapter = adapters.init_adapter(config.adapter, runtime.student.config, base, config.seed, words)
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
