"""A decoder's parameter tree from a weight source, from a seed, or into a file; each leaf directly in its shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, write_json
from sqa_jax.students.config import DecoderConfig, to_hf
from sqa_jax.students.layout import Leaf, build, leaves
from sqa_jax.students.sources import WeightSource

Tree = dict[str, Any]
ShardingsFor = Callable[[Tree], Tree]  # from a tree of shapes to a tree of shardings


def shapes(config: DecoderConfig, dtype=jnp.float32) -> Tree:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return build(config, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype))


def check(source: WeightSource, config: DecoderConfig) -> None:
    """Checks a source against the configuration before anything is read.

    Raises:
      UserError: a tensor is missing, is not expected, or has another shape; it is named.
    """
    expected = {name: leaf.file_shape for leaf in leaves(config) for name in leaf.names}
    for name, shape in expected.items():
        if name not in source.shapes:
            raise UserError(f"{source.where}: tensor {name} {shape} is missing; the file does not fit its configuration, fetch both again")
        if source.shapes[name] != shape:
            raise UserError(
                f"{source.where}: tensor {name} has shape {source.shapes[name]}, but the configuration says {shape}; fetch both again"
            )
    # Some publishers store what the configuration already says: a tied output layer, or rotary frequencies.
    extra = [n for n in source.shapes if n not in expected and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(f"{source.where}: tensor {extra[0]} is not part of the configured model; wrong config.json or an unsupported variant")
    if config.tie_embeddings and "lm_head.weight" in source.shapes:
        if not np.array_equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
            raise UserError(f"{source.where}: lm_head.weight differs from the embeddings that the configuration ties it to; set tie_word_embeddings to false")


def read_params(source: WeightSource, config: DecoderConfig, dtype=jnp.float32, shardings_for: ShardingsFor | None = None) -> Tree:
    """Reads every parameter; host memory holds one (stacked) parameter at a time above the model itself.

    Args:
      dtype: of the parameters in memory.
      shardings_for: where each parameter lies; None is the default device.

    Raises:
      UserError: as `check`, or the file breaks off while it is read.
    """
    check(source, config)
    placed = None if shardings_for is None else shardings_for(shapes(config, dtype))

    def read(leaf: Leaf) -> jax.Array:
        def one(name):
            values = source.read(name)
            return values.T if leaf.transposed else values

        host = np.empty(leaf.shape, dtype)
        if leaf.stacked:
            for layer, name in enumerate(leaf.names):
                host[layer] = one(name)
        else:
            host[...] = one(leaf.names[0])
        if placed is None:
            return jnp.asarray(host)
        sharding = placed
        for key in leaf.path:
            sharding = sharding[key]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: host[index])

    return build(config, read)


def random_params(config: DecoderConfig, seed: int, dtype=jnp.float32, shardings_for: ShardingsFor | None = None) -> Tree:
    """Random parameters: matrices from N(0, 0.02²), norms one, biases zero; created where they lie."""

    def make(key):
        keys = iter(jax.random.split(key, len(leaves(config))))

        def one(leaf: Leaf):
            key = next(keys)
            if leaf.path[-1] in ("kernel", "embedding"):
                return (jax.random.normal(key, leaf.shape) * 0.02).astype(dtype)
            return jnp.full(leaf.shape, leaf.path[-1] == "scale", dtype)

        return build(config, one)

    placed = None if shardings_for is None else shardings_for(shapes(config, dtype))
    return jax.jit(make, out_shardings=placed)(jax.random.key(seed))


def save_safetensors(params: Tree, config: DecoderConfig, directory: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` (float32) as transformers reads them, whole or not at all.

    Raises:
      UserError: the directory exists already, or the disk is full.
    """
    from safetensors.numpy import save_file

    tensors = {}
    for leaf in leaves(config):
        values = params
        for key in leaf.path:
            values = values[key]
        host = np.asarray(values, np.float32)
        for index, name in enumerate(leaf.names):
            one = host[index] if leaf.stacked else host
            tensors[name] = np.ascontiguousarray(one.T if leaf.transposed else one)
    with atomic_directory(directory) as beside:
        write_json(beside / "config.json", to_hf(config))
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
