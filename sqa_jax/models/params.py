"""The table of a model's parameters: path in our tree, shape, and names in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqa_jax.models import decoder_params
from sqa_jax.models.param_spec import ParamSpec, ParamTree
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.t5 import params as t5_params
from sqa_jax.models.vision.registry import vision_family

VISION = "vision"  # key of vision encoder and connector in a model's parameter tree


def param_specs(config: StudentConfig) -> list[ParamSpec]:
    """Every parameter of a model."""
    vision = [] if config.vision is None else vision_family(config.vision).param_specs(config.vision)
    return _family(config).param_specs(config) + vision


def _family(config: StudentConfig) -> Any:
    """The module with the parameter table of a model's family."""
    return t5_params if config.is_encoder_decoder else decoder_params


def linear_layers(config: StudentConfig) -> dict[str, ParamSpec]:
    """The kernels of the language model's linear layers, by their names in an adapter's tree."""
    kernels = [
        spec for spec in param_specs(config) if spec.stacked and spec.path[-1] == "kernel" and spec.path[0] != VISION
    ]
    return dict(zip(config.linear_shapes(), kernels, strict=True))


def vision_linear_layers(config: StudentConfig) -> dict[str, ParamSpec]:
    """The kernels of vision encoder and connector that LoRA may adapt, by adapter-tree names such as "vision.fc1".

    Those of the encoder's blocks are stacked, the connector's are not.
    """
    kernels = [spec for spec in param_specs(config) if spec.path[0] == VISION and spec.path[-1] == "kernel"]
    linear = [
        spec for spec in kernels if len(spec.shape) == 2 + spec.stacked
    ]  # not the convolutions that embed patches
    return {".".join((VISION, *(spec.path[-2:-1] if spec.stacked else spec.path[1:-1]))): spec for spec in linear}


def repeated_tensors(config: StudentConfig) -> dict[str, str]:
    """Tensors that a file may hold although they repeat others: {copy: original}."""
    table = param_specs(config)[0].names[0]
    return dict.fromkeys((*_family(config).COPIES, *["lm_head.weight"] * config.tie_embeddings), table)


def published_name(config: StudentConfig, name: str) -> str:
    """The name in published files of a tensor that our table calls `name`."""
    return name if config.vision is None else vision_family(config.vision).TENSOR_NAMES.published(name)


def module_names(config: StudentConfig, name: str) -> tuple[str, ...]:
    """The names in transformers' releases of a module that our table calls `name`, the newest last."""
    return (name,) if config.vision is None else vision_family(config.vision).TENSOR_NAMES.spellings(name)


def unused_tensors(config: StudentConfig) -> tuple[str, ...]:
    """Tensors that a file may hold although the model does not use them."""
    return _family(config).UNUSED


def build_tree(config: StudentConfig, make: Callable[[ParamSpec], Any]) -> ParamTree:
    """The nested tree with `make(spec)` for each parameter."""
    tree: ParamTree = {}
    for spec in param_specs(config):
        node = tree
        for key in spec.path[:-1]:
            node = node.setdefault(key, {})
        node[spec.path[-1]] = make(spec)
    return tree
