"""The one table of a student's parameters: path in our tree, shape, and names in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqa_jax.models import decoder_params
from sqa_jax.models.param_spec import ParamSpec, ParamTree
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.t5 import params as t5_params
from sqa_jax.models.vision.registry import vision_family

VISION = "vision"  # where in a student's tree tower and connector are


def param_specs(config: StudentConfig) -> list[ParamSpec]:
    """Every parameter of a student."""
    vision = [] if config.vision is None else vision_family(config.vision).param_specs(config.vision)
    return _family(config).param_specs(config) + vision


def _family(config: StudentConfig) -> Any:
    """The module with the parameter table of a model's family."""
    return t5_params if config.is_encoder_decoder else decoder_params


def linear_layers(config: StudentConfig) -> dict[str, ParamSpec]:
    """The kernels of all blocks' linear layers, by their names in an adapter's tree."""
    kernels = [
        leaf for leaf in param_specs(config) if leaf.stacked and leaf.path[-1] == "kernel" and leaf.path[0] != VISION
    ]
    return dict(zip(config.linear_shapes(), kernels, strict=True))


def vision_linear_layers(config: StudentConfig) -> dict[str, ParamSpec]:
    """The kernels of tower and connector that LoRA may adapt, by their names in an adapter's tree, such as "vision.fc1".

    They are those of the tower's blocks, which are stacked, and the connector's, which are not.
    """
    seen = [leaf for leaf in param_specs(config) if leaf.path[0] == VISION and leaf.path[-1] == "kernel"]
    linear = [leaf for leaf in seen if len(leaf.shape) == 2 + leaf.stacked]  # patches are embedded by convolutions
    return {".".join((VISION, *(leaf.path[-2:-1] if leaf.stacked else leaf.path[1:-1]))): leaf for leaf in linear}


def repeated_tensors(config: StudentConfig) -> dict[str, str]:
    """Tensors that a file may hold although they only repeat others, and which."""
    table = param_specs(config)[0].names[0]
    return dict.fromkeys((*_family(config).COPIES, *["lm_head.weight"] * config.tie_embeddings), table)


def published_name(config: StudentConfig, name: str) -> str:
    """How a published file calls a tensor that our table calls `name`."""
    return name if config.vision is None else vision_family(config.vision).TENSOR_NAMES.published(name)


def module_names(config: StudentConfig, name: str) -> tuple[str, ...]:
    """What transformers' releases call a module that our table calls `name`, the newest last."""
    return (name,) if config.vision is None else vision_family(config.vision).TENSOR_NAMES.spellings(name)


def unused_tensors(config: StudentConfig) -> tuple[str, ...]:
    """Tensors that a file may hold although the model computes nothing with them."""
    return _family(config).UNUSED


def build_tree(config: StudentConfig, make: Callable[[ParamSpec], Any]) -> ParamTree:
    """The nested tree with `make(spec)` for each parameter."""
    tree: ParamTree = {}
    for leaf in param_specs(config):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = make(leaf)
    return tree
