"""The one table of a student's parameters: path in our tree, shape, and names in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqa_jax.students.config import DecoderConfig, StudentConfig
from sqa_jax.students.leaf import Leaf
from sqa_jax.students.t5_config import T5Config
from sqa_jax.students.t5_layout import COPIES, UNUSED, t5_leaves


def leaves(config: StudentConfig) -> list[Leaf]:
    """Every parameter of a student."""
    return t5_leaves(config) if isinstance(config, T5Config) else _decoder_leaves(config)


def linear_layers(config: StudentConfig) -> dict[str, Leaf]:
    """The kernels of all blocks' linear layers, by their names in an adapter's tree."""
    kernels = [leaf for leaf in leaves(config) if leaf.stacked and leaf.path[-1] == "kernel"]
    return dict(zip(config.linear_shapes(), kernels, strict=True))


def copies(config: StudentConfig) -> dict[str, str]:
    """Tensors that a file may hold although they only repeat others, and which."""
    table = leaves(config)[0].names[0]
    repeated = COPIES if isinstance(config, T5Config) else ()
    return dict.fromkeys((*repeated, *["lm_head.weight"] * config.tie_embeddings), table)


def unused(config: StudentConfig) -> tuple[str, ...]:
    """Tensors that a file may hold although the model computes nothing with them."""
    return UNUSED if isinstance(config, T5Config) else ()


def _decoder_leaves(config: DecoderConfig) -> list[Leaf]:
    D, L = config.hidden_size, config.num_layers

    def layered(path: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> Leaf:
        names = tuple(f"model.layers.{i}.{name}" for i in range(L))
        return Leaf(("layers", *path), (L, *shape), names, True, transposed)

    table = [
        Leaf(("embed_tokens", "embedding"), (config.vocab_size, D), ("model.embed_tokens.weight",), False, False),
        Leaf(("norm", "scale"), (D,), ("model.norm.weight",), False, False),
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
        table.append(Leaf(("lm_head", "kernel"), (D, config.vocab_size), ("lm_head.weight",), False, True))
    return table


def build(config: StudentConfig, make: Callable[[Leaf], Any]) -> dict[str, Any]:
    """The nested tree with `make(leaf)` for each parameter."""
    tree: dict[str, Any] = {}
    for leaf in leaves(config):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = make(leaf)
    return tree
