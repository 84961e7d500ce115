"""The one table of a decoder's parameters: path in our tree, shape, and names in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sqa_jax.students.config import DecoderConfig


class Leaf(NamedTuple):
    """One parameter.

    Attributes:
      path: keys in our tree.
      shape: ours; a stacked parameter has the layers in front.
      names: the file's tensors that it is made of, one a layer, or just one.
      stacked: whether `names` are layers.
      transposed: whether the file has the last two dimensions the other way, as PyTorch has (out, in).
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of each of `names` in the file."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves(config: DecoderConfig) -> list[Leaf]:
    """Every parameter of a decoder."""
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


def build(config: DecoderConfig, make: Callable[[Leaf], Any]) -> dict[str, Any]:
    """The nested tree with `make(leaf)` for each parameter."""
    tree: dict[str, Any] = {}
    for leaf in leaves(config):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = make(leaf)
    return tree
