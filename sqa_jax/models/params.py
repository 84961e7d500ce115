"""The one table of a student's parameters: path in our tree, shape, and names in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqa_jax.models.decoder_config import DecoderConfig, StudentConfig
from sqa_jax.models.param_spec import ParamSpec
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.t5.params import COPIES, UNUSED, t5_param_specs
from sqa_jax.models.vision.registry import vision_family

VISION = "vision"  # where in a student's tree tower and connector are


def param_specs(config: StudentConfig) -> list[ParamSpec]:
    """Every parameter of a student."""
    if isinstance(config, T5Config):
        return t5_param_specs(config)
    seen = [] if config.vision is None else vision_family(config.vision).param_specs(config.vision)
    return _decoder_leaves(config) + seen


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


def copies(config: StudentConfig) -> dict[str, str]:
    """Tensors that a file may hold although they only repeat others, and which."""
    table = param_specs(config)[0].names[0]
    repeated = COPIES if isinstance(config, T5Config) else ()
    return dict.fromkeys((*repeated, *["lm_head.weight"] * config.tie_embeddings), table)


def published(config: StudentConfig, name: str) -> str:
    """How a published file calls a tensor that our table calls `name`."""
    return name if config.vision is None else vision_family(config.vision).NAMES.published(name)


def modules(config: StudentConfig, name: str) -> tuple[str, ...]:
    """What transformers' releases call a module that our table calls `name`, the newest last."""
    return (name,) if config.vision is None else vision_family(config.vision).NAMES.spellings(name)


def unused(config: StudentConfig) -> tuple[str, ...]:
    """Tensors that a file may hold although the model computes nothing with them."""
    return UNUSED if isinstance(config, T5Config) else ()


def _decoder_leaves(config: DecoderConfig) -> list[ParamSpec]:
    D, L = config.hidden_size, config.num_layers

    def layered(path: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        names = tuple(f"model.layers.{i}.{name}" for i in range(L))
        return ParamSpec(("layers", *path), (L, *shape), names, True, transposed)

    table = [
        ParamSpec(("embed_tokens", "embedding"), (config.vocab_size, D), ("model.embed_tokens.weight",), False, False),
        ParamSpec(("norm", "scale"), (D,), ("model.norm.weight",), False, False),
    ]
    for norm in config.norms():
        table.append(layered((norm, "scale"), f"{norm}.weight", (D,)))
    for norm in ("q_norm", "k_norm") if config.qk_norm else ():
        table.append(layered(("self_attn", norm, "scale"), f"self_attn.{norm}.weight", (config.head_dim,)))
    for layer, (module, width_in, width_out) in config.linear_shapes().items():
        table.append(layered((module, layer, "kernel"), f"{module}.{layer}.weight", (width_in, width_out), True))
        if config.bias(layer):
            table.append(layered((module, layer, "bias"), f"{module}.{layer}.bias", (width_out,)))
    if not config.tie_embeddings:
        table.append(ParamSpec(("lm_head", "kernel"), (D, config.vocab_size), ("lm_head.weight",), False, True))
    return table


def build(config: StudentConfig, make: Callable[[ParamSpec], Any]) -> dict[str, Any]:
    """The nested tree with `make(leaf)` for each parameter."""
    tree: dict[str, Any] = {}
    for leaf in param_specs(config):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = make(leaf)
    return tree
