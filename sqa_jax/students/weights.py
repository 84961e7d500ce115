"""A student's parameter tree from a weight source, from a seed, or into a file; each leaf directly in its shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, write_json
from sqa_jax.students.config import StudentConfig
from sqa_jax.students.hf_config import to_hf
from sqa_jax.students.layout import build, copies, leaves, unused
from sqa_jax.students.leaf import Leaf
from sqa_jax.students.safetensors_file import write_safetensors
from sqa_jax.students.safetensors_source import INDEX
from sqa_jax.students.sources import WeightSource
from sqa_jax.students.t5_config import T5Config

Tree = dict[str, Any]
ShardingsFor = Callable[[Tree], Tree]  # from a tree of shapes to a tree of shardings


def shapes(config: StudentConfig, dtype=jnp.float32) -> Tree:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return build(config, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype))


def check(source: WeightSource, config: StudentConfig) -> None:
    """Checks a source against the configuration before anything is read.

    Raises:
      UserError: a tensor is missing, is not expected, or has another shape; it is named.
    """
    again = "fetch weights and configuration again"
    layers = max(config.num_layers, config.num_encoder_layers if isinstance(config, T5Config) else 0)
    if layers > len(source.shapes):  # before a damaged number of layers is spelled out name by name
        raise UserError(
            f"{source.where}: {len(source.shapes)} tensors cannot be the configured {layers} layers; {again}"
        )
    expected = {name: leaf.file_shape for leaf in leaves(config) for name in leaf.names}
    for name, shape in expected.items():
        found = source.shapes.get(name)
        if found is None:
            raise UserError(f"{source.locate(name)} {shape} is missing, but the configuration asks for it; {again}")
        if found != shape:
            raise UserError(f"{source.locate(name)} has shape {found}, but the configuration says {shape}; {again}")
    # Some publishers store what the configuration already says: a tied output layer, or rotary frequencies.
    repeated = {name: table for name, table in copies(config).items() if name in source.shapes}
    known = {*expected, *repeated, *unused(config)}
    extra = [name for name in source.shapes if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(
            f"{source.locate(extra[0])}{more} is not part of the configured model; "
            "the configuration is another model's, or a variant that is not supported"
        )
    for name, table in repeated.items():
        if not _same(source, name, table):
            raise UserError(
                f"{source.locate(name)} differs from the embeddings ({table}) that the configuration ties it to; "
                "set tie_word_embeddings to false, or fetch the weights again"
            )


def _same(source: WeightSource, one: str, other: str, step: int = 4096) -> bool:
    """Whether two stored tensors are the same, compared a few rows at a time."""
    if source.shapes[one] != source.shapes[other]:
        return False
    count = source.shapes[other][0]
    pieces = (slice(start, min(start + step, count)) for start in range(0, count, step))
    return all(np.array_equal(source.read(one, rows), source.read(other, rows)) for rows in pieces)


def read_params(
    source: WeightSource, config: StudentConfig, dtype=jnp.float32, shardings_for: ShardingsFor | None = None
) -> Tree:
    """Reads every parameter, and of each only what this process holds.

    Host memory holds that part of one (stacked) parameter at a time, besides the model where that lies there too.

    Args:
      dtype: of the parameters in memory.
      shardings_for: where each parameter lies; None is the default device.

    Raises:
      UserError: as `check`.
    """
    check(source, config)
    placed = None if shardings_for is None else shardings_for(shapes(config, dtype))

    def read(leaf: Leaf) -> jax.Array:
        if placed is None:
            return jnp.asarray(_read_box(source, leaf, tuple(slice(0, n) for n in leaf.shape), dtype))
        sharding = placed
        for key in leaf.path:
            sharding = sharding[key]
        box = _held_here(sharding, leaf.shape)
        host = _read_box(source, leaf, box, dtype)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            bounds = [part.indices(n) for part, n in zip(index, leaf.shape, strict=True)]
            return host[tuple(slice(b[0] - own.start, b[1] - own.start) for b, own in zip(bounds, box, strict=True))]

        return jax.make_array_from_callback(leaf.shape, sharding, shard)

    return build(config, read)


def _held_here(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The smallest block that holds all shards of this process: each row is then decoded once, however many share it."""
    shards = sharding.addressable_devices_indices_map(shape).values()
    bounds = [[part.indices(n)[:2] for part, n in zip(index, shape, strict=True)] for index in shards]
    return tuple(slice(min(b[0] for b in own), max(b[1] for b in own)) for own in zip(*bounds, strict=True))


def _read_box(source: WeightSource, leaf: Leaf, box: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """A block of one parameter, in our orientation."""
    host = np.empty([own.stop - own.start for own in box], dtype)
    names, inner = (leaf.names[box[0]], box[1:]) if leaf.stacked else (leaf.names, box)
    rows, *columns = inner[::-1] if leaf.transposed else inner
    for target, name in zip(host if leaf.stacked else host[None], names, strict=True):
        values = source.read(name, rows)[(slice(None), *columns)]
        target[...] = values.T if leaf.transposed else values
    return host


def random_params(
    config: StudentConfig, seed: int, dtype=jnp.float32, shardings_for: ShardingsFor | None = None
) -> Tree:
    """Random parameters: matrices from N(0, 0.02²), norms that only norm, biases zero; created where they lie."""

    def make(key):
        keys = iter(jax.random.split(key, len(leaves(config))))

        def one(leaf: Leaf):
            key = next(keys)
            if leaf.path[-1] in ("kernel", "embedding"):
                return (jax.random.normal(key, leaf.shape) * 0.02).astype(dtype)
            return jnp.full(leaf.shape, leaf.path[-1] == "scale" and not config.norm_offset, dtype)

        return build(config, one)

    placed = None if shardings_for is None else shardings_for(shapes(config, dtype))
    return jax.jit(make, out_shardings=placed)(jax.random.key(seed))


def save_safetensors(params: Tree, config: StudentConfig, directory: str | Path) -> None:
    """Makes a directory of `write_model`'s files in float32, whole or not at all.

    Raises:
      UserError: the directory exists already, or the disk is full.
    """
    with atomic_directory(directory) as beside:
        write_model(params, config, beside)


def write_model(
    params: Tree, config: StudentConfig, directory: Path, dtype: str = "float32", shard_size: str | int = "5GB"
) -> None:
    """Writes `config.json` and the weights into a directory, as transformers reads them.

    Host memory holds one shard at a time.

    Args:
      dtype: float32 or bfloat16.
      shard_size: where the weights are larger, they are split into files of at most this size, with an index.

    Raises:
      UserError: the disk is full.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    width = jnp.dtype(dtype).itemsize
    parts = {name: (leaf, index) for leaf in leaves(config) for index, name in enumerate(leaf.names)}

    def tensor(leaf: Leaf, index: int) -> np.ndarray:
        values = params
        for key in leaf.path:
            values = values[key]
        host = np.asarray(values[index] if leaf.stacked else values).astype(dtype)
        return np.ascontiguousarray(host.T if leaf.transposed else host)

    plan = split_state_dict_into_shards_factory(
        parts,
        get_storage_size=lambda part: math.prod(part[0].file_shape) * width,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        write_safetensors(directory / file, {name: tensor(*parts[name]) for name in names})
    if plan.is_sharded:
        write_json(directory / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    write_json(directory / "config.json", {**to_hf(config), "torch_dtype": dtype})
