"""Run-time checks of jaxtyping's shape annotations by beartype: a call with another shape or dtype than annotated fails.

`install` comes before the first import of `sqa_jax`. Shapes are known while JAX traces a function, so compiled code is
checked, too, and is no slower.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

# Packages and modules whose functions are checked.
MODULES = (
    "sqa_jax.adapters",
    "sqa_jax.batches",
    "sqa_jax.inference",
    "sqa_jax.metrics",
    "sqa_jax.models.api",
    "sqa_jax.models.decoder",
    "sqa_jax.models.layers",
    "sqa_jax.models.log_probs",
    "sqa_jax.models.rope_frequencies",
    "sqa_jax.models.t5",
    "sqa_jax.models.vision",
    "sqa_jax.parallel",
    "sqa_jax.training.loss",
)


def install() -> None:
    """Checks what is imported of MODULES from now on."""
    jaxtyping.install_import_hook(list(MODULES), f"{__name__}.check_shapes")


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with beartype's checks of those arguments and results whose annotations have shapes.

    Other annotations are the type checker's: many name protocols, or what is imported for type checking only.
    """
    kept = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, function.__globals__)
            except NameError:
                continue
        if _has_shape(annotation):
            kept[name] = annotation
    if not kept:
        return function
    function.__annotations__ = kept
    return beartype.beartype(function)


def _has_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(annotation)))
