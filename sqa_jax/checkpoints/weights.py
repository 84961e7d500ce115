"""A student's parameter tree from a weight source, from a seed, or into a file; each leaf directly in its shards."""

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
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.param_spec import ParamSpec
from sqa_jax.models.params import VISION, build, copies, param_specs, published, unused
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.vision.registry import vision_family

Tree = dict[str, Any]
ShardingsFor = Callable[[Tree], Tree]  # from a tree of shapes to a tree of shardings
Box = tuple[range, ...]  # a block of a parameter: its places in each dimension


def param_shapes(config: StudentConfig, dtype=jnp.float32) -> Tree:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return build(config, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype))


def check_source(source: WeightSource, config: StudentConfig) -> None:
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
    expected = {name: leaf.file_shape for leaf in param_specs(config) for name in leaf.names}
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

    On a CPU the model's memory is filled in place: besides it there is one tensor of the file at a time. Elsewhere host
    memory holds this process' part of one (stacked) parameter at a time.

    Args:
      dtype: of the parameters in memory.
      shardings_for: where each parameter lies; None is the default device.

    Raises:
      UserError: as `check_source`.
    """
    check_source(source, config)
    placed = None if shardings_for is None else shardings_for(param_shapes(config, dtype))

    def read(leaf: ParamSpec) -> jax.Array:
        if placed is None:
            return jax.device_put(_read_boxes(source, leaf, [tuple(map(range, leaf.shape))], dtype)[0])
        sharding = placed
        for key in leaf.path:
            sharding = sharding[key]
        held = sharding.addressable_devices_indices_map(leaf.shape).values()
        boxes = list(dict.fromkeys(_box(index, leaf.shape) for index in held))
        hosts = dict(zip(boxes, _read_boxes(source, leaf, boxes, dtype), strict=True))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: hosts[_box(index, leaf.shape)])

    return build(config, read)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(range(*part.indices(n)) for part, n in zip(index, shape, strict=True))


def _read_boxes(source: WeightSource, leaf: ParamSpec, boxes: Sequence[Box], dtype: Any) -> list[np.ndarray]:
    """Blocks of one parameter, in our orientation. Each row is decoded once, however many blocks share it."""
    hosts = [_aligned(tuple(map(len, box)), dtype) for box in boxes]
    layered = [
        (host, *box) if leaf.stacked else (host[None], range(1), *box) for host, box in zip(hosts, boxes, strict=True)
    ]

    for place, name in enumerate(leaf.names):
        wanted = [
            (host[layers.index(place)], block[::-1] if leaf.transposed else block)
            for host, layers, *block in layered
            if place in layers
        ]
        if not wanted:
            continue
        first, last = min(rows.start for _, (rows, *_) in wanted), max(rows.stop for _, (rows, *_) in wanted)
        values = source.read(name, slice(first, last))
        for target, (rows, *columns) in wanted:
            part = values[(slice(rows.start - first, rows.stop - first), *(slice(c.start, c.stop) for c in columns))]
            if leaf.transposed:
                _transpose(part, target)
            else:
                target[...] = part
    return hosts


def _transpose(values: np.ndarray, target: np.ndarray, strip: int = 16) -> None:
    """Writes values with their dimensions reversed, some rows at a time: what is read and written stays in the cache."""
    for start in range(0, len(values), strip):
        target[..., start : start + strip] = values[start : start + strip].T


def _aligned(shape: tuple[int, ...], dtype: Any, alignment: int = 64) -> np.ndarray:
    """An empty array that begins where XLA's own do: on a CPU, JAX then takes it as it is and makes no copy."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    room = np.empty(size + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    return room[start : start + size].view(dtype).reshape(shape)


def random_params(
    config: StudentConfig, seed: int, dtype=jnp.float32, shardings_for: ShardingsFor | None = None
) -> Tree:
    """Random parameters: matrices from N(0, 1/n), norms that only norm, biases zero; created where they lie.

    n is the number of a matrix' inputs (LeCun et al. 1998, "Efficient BackProp", section 4.6), or an embedding's width.
    """

    def make(key):
        keys = iter(jax.random.split(key, len(param_specs(config))))

        def one(leaf: ParamSpec):
            key = next(keys)
            if leaf.path[-1] in ("kernel", "embedding"):
                inputs = leaf.shape[leaf.stacked : -1] if leaf.path[-1] == "kernel" else leaf.shape[-1:]
                return (jax.random.normal(key, leaf.shape) * math.prod(inputs) ** -0.5).astype(dtype)
            offset = config.norm_offset and leaf.path[0] != VISION
            return jnp.full(leaf.shape, leaf.path[-1] == "scale" and not offset, dtype)

        return build(config, one)

    placed = None if shardings_for is None else shardings_for(param_shapes(config, dtype))
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
    parts = {
        published(config, name): (leaf, index) for leaf in param_specs(config) for index, name in enumerate(leaf.names)
    }

    def tensor(leaf: ParamSpec, index: int) -> np.ndarray:
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
    if config.vision is not None:
        processor = vision_family(config.vision).processor_to_hf(config.vision)
        write_json(directory / PROCESSORS[0], processor)
        if own := {key: processor[key] for key in ("processor_class", "image_seq_len") if "image_seq_len" in processor}:
            write_json(directory / PROCESSORS[1], own)
