"""Reading, initialising and writing a student's parameter tree; each parameter directly in its shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqa_jax.checkpoints.hf_config import to_hf
from sqa_jax.checkpoints.safetensors_file import write_safetensors
from sqa_jax.checkpoints.safetensors_source import INDEX, PROCESSORS
from sqa_jax.checkpoints.sources import WeightSource
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, write_json
from sqa_jax.models.param_spec import ParamSpec, ParamTree
from sqa_jax.models.params import VISION, build_tree, param_specs, published_name, repeated_tensors, unused_tensors
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.vision.registry import vision_family

ShardingsFor = Callable[[ParamTree], ParamTree]  # from a tree of shapes to a tree of shardings
Block = tuple[range, ...]  # of a parameter: the indices in each dimension


def param_shapes(config: StudentConfig, dtype=jnp.float32) -> ParamTree:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return build_tree(config, lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype))


def check_source(source: WeightSource, config: StudentConfig) -> None:
    """Checks a source against the configuration before anything is read.

    Raises:
      UserError: a tensor is missing, is not expected, or has another shape; it is named.
    """
    again = "fetch weights and configuration again"
    layers = max(config.stack_depths)
    if layers > len(source.shapes):  # before the names of a damaged number of layers are listed
        raise UserError(
            f"{source.where}: {len(source.shapes)} tensors cannot be the configured {layers} layers; {again}"
        )
    expected = {name: spec.file_shape for spec in param_specs(config) for name in spec.names}
    for name, shape in expected.items():
        found = source.shapes.get(name)
        if found is None:
            raise UserError(f"{source.locate(name)} {shape} is missing, but the configuration asks for it; {again}")
        if found != shape:
            raise UserError(f"{source.locate(name)} has shape {found}, but the configuration says {shape}; {again}")
    # Some publishers store what the configuration implies: a tied output layer, or rotary frequencies.
    repeated = {name: table for name, table in repeated_tensors(config).items() if name in source.shapes}
    known = {*expected, *repeated, *unused_tensors(config)}
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
) -> ParamTree:
    """Reads every parameter, and of each only the shards of this process' devices.

    On a CPU the model's memory is filled in place: besides it there is one tensor of the file at a time. Elsewhere host
    memory contains this process' part of one (stacked) parameter at a time.

    Args:
      dtype: of the parameters in memory.
      shardings_for: gives the sharding of each parameter; None is the default device.

    Raises:
      UserError: as `check_source`.
    """
    check_source(source, config)
    shardings = None if shardings_for is None else shardings_for(param_shapes(config, dtype))

    def read(spec: ParamSpec) -> jax.Array:
        if shardings is None:
            return jax.device_put(read_blocks(source, spec, [tuple(map(range, spec.shape))], dtype)[0])
        sharding: jax.sharding.Sharding = _at(shardings, spec)
        local = sharding.addressable_devices_indices_map(spec.shape).values()
        blocks = list(dict.fromkeys(_block(index, spec.shape) for index in local))
        hosts = dict(zip(blocks, read_blocks(source, spec, blocks, dtype), strict=True))
        return jax.make_array_from_callback(spec.shape, sharding, lambda index: hosts[_block(index, spec.shape)])

    return build_tree(config, read)


def _at(tree: ParamTree, spec: ParamSpec) -> Any:
    """The leaf of a tree that is this parameter's."""
    node: Any = tree
    for key in spec.path:
        node = node[key]
    return node


def _block(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Block:
    assert index is not None
    return tuple(range(*part.indices(n)) for part, n in zip(index, shape, strict=True))


def read_blocks(source: WeightSource, spec: ParamSpec, blocks: Sequence[Block], dtype: Any) -> list[np.ndarray]:
    """Blocks of one parameter, in our orientation. Each row is decoded once, however many blocks share it."""
    hosts = [_aligned(tuple(map(len, block)), dtype) for block in blocks]
    layered = [
        (host, *block) if spec.stacked else (host[None], range(1), *block)
        for host, block in zip(hosts, blocks, strict=True)
    ]

    for layer, name in enumerate(spec.names):
        targets = [
            (host[layers.index(layer)], block[::-1] if spec.transposed else block)
            for host, layers, *block in layered
            if layer in layers
        ]
        if not targets:
            continue
        first, last = min(rows.start for _, (rows, *_) in targets), max(rows.stop for _, (rows, *_) in targets)
        values = source.read(name, slice(first, last))
        for target, (rows, *columns) in targets:
            part = values[(slice(rows.start - first, rows.stop - first), *(slice(c.start, c.stop) for c in columns))]
            if spec.transposed:
                _transpose(part, target)
            else:
                target[...] = part
    return hosts


def _transpose(values: np.ndarray, target: np.ndarray, strip: int = 16) -> None:
    """Writes values with their dimensions reversed, some rows at a time, so that both sides stay in the CPU's cache."""
    for start in range(0, len(values), strip):
        target[..., start : start + strip] = values[start : start + strip].T


def _aligned(shape: tuple[int, ...], dtype: Any, alignment: int = 64) -> np.ndarray:
    """An empty array with XLA's alignment: on a CPU, JAX then uses its memory without a copy."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def random_params(
    config: StudentConfig, seed: int, dtype=jnp.float32, shardings_for: ShardingsFor | None = None
) -> ParamTree:
    """Random parameters: matrices from N(0, 1/n), norm scales one, biases zero; created in their shards.

    n is the number of a matrix' inputs (LeCun et al. 1998, "Efficient BackProp", section 4.6), or an embedding's width.
    """

    def init(key: jax.Array) -> ParamTree:
        keys = iter(jax.random.split(key, len(param_specs(config))))

        def init_one(spec: ParamSpec) -> jax.Array:
            key = next(keys)
            if spec.path[-1] in ("kernel", "embedding"):
                inputs = spec.shape[spec.stacked : -1] if spec.path[-1] == "kernel" else spec.shape[-1:]
                return (jax.random.normal(key, spec.shape) * math.prod(inputs) ** -0.5).astype(dtype)
            offset = config.norm_offset and spec.path[0] != VISION
            return jnp.full(spec.shape, spec.path[-1] == "scale" and not offset, dtype)

        return build_tree(config, init_one)

    shardings = None if shardings_for is None else shardings_for(param_shapes(config, dtype))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def save_safetensors(params: ParamTree, config: StudentConfig, directory: str | Path) -> None:
    """Makes a directory with `write_model`'s files in float32, atomically.

    Raises:
      UserError: the directory exists already, or the disk is full.
    """
    with atomic_directory(directory) as temporary:
        write_model(params, config, temporary)


def write_model(
    params: ParamTree, config: StudentConfig, directory: Path, dtype: str = "float32", shard_size: str | int = "5GB"
) -> None:
    """Writes `config.json` and the weights into a directory, as transformers reads them.

    Host memory contains one file at a time.

    Args:
      dtype: float32 or bfloat16.
      shard_size: where the weights are larger, they are split into files of at most this size, with an index.

    Raises:
      UserError: the disk is full.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    width = jnp.dtype(dtype).itemsize
    parts = {
        published_name(config, name): (spec, index)
        for spec in param_specs(config)
        for index, name in enumerate(spec.names)
    }

    def tensor(spec: ParamSpec, index: int) -> np.ndarray:
        values = _at(params, spec)
        host = np.asarray(values[index] if spec.stacked else values).astype(dtype)
        return np.ascontiguousarray(host.T if spec.transposed else host)

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
    if config.vision is not None:
        processor = vision_family(config.vision).processor_to_hf(config.vision)
        write_json(directory / PROCESSORS[0], processor)
        keys = ("processor_class", "image_seq_len") if "image_seq_len" in processor else ()
        if keys:
            write_json(directory / PROCESSORS[1], {key: processor[key] for key in keys})
