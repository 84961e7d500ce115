"""The device mesh: (data, fsdp, tensor)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree, Shaped

from sqa_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the batch dimension is sharded over both: fsdp shards the parameters *and* the data


def make_mesh(settings: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axis sizes of `config.mesh`, one of which may be -1 (inferred).

    Neighbours on the mesh are neighbours on a TPU's torus. Multi-slice runs get a hybrid mesh: slices are connected by
    the data center's network (DCN) only, so the `data` axis, which communicates least, spans them.

    Args:
      settings: `config.mesh`.
      devices: default all devices of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the slices do not divide the `data` axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [settings[axis] for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"config.mesh is {dict(zip(AXES, shape, strict=True))}; sizes are positive, and one may be -1")
    known = math.prod(size for size in shape if size != -1)
    shape = [len(devices) // known if size == -1 else size for size in shape]
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh: {' × '.join(map(str, shape))} ({', '.join(AXES)}) does not use exactly the "
            f"{len(devices)} devices here; set one axis to -1 or choose sizes whose product is {len(devices)}"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if shape[0] % slices:
        raise UserError(
            f"config.mesh.data is {shape[0]}, which the {slices} slices do not divide; use a multiple of them"
        )
    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        device_array = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        device_array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(device_array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The batch dimension sharded over the data axes, after `leading` replicated dimensions."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH))


def row_shards(mesh: Mesh) -> int:
    """Number of shards of the batch dimension."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_rows(mesh: Mesh, rows: int) -> Int[np.ndarray, " N"]:
    """Indices of the batch rows on this process's devices, ascending; replicas over `tensor` count once."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in slices]))


def place_rows(
    batch: PyTree[Shaped[np.ndarray, ...]],
    mesh: Mesh,
    rows: int,
    local: Int[np.ndarray, " N"] | None = None,
    leading: int = 0,
) -> PyTree[Shaped[jax.Array, ...]]:
    """Places a batch from host memory on the mesh, sharded over the batch dimension.

    Args:
      batch: tree of arrays with the batch dimension after `leading` others: all rows on every process, or, with
        `local`, only the process's rows.
      rows: global batch size.
      local: as `local_rows`.
    """
    sharding = batch_sharding(mesh, leading)
    index_of = {int(row): index for index, row in enumerate(np.arange(rows) if local is None else local)}

    def place(array: np.ndarray) -> jax.Array:
        shape = (*array.shape[:leading], rows, *array.shape[leading + 1 :])

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[leading].indices(rows)
            first = index_of[start]
            return array[(*index[:leading], slice(first, first + stop - start), *index[leading + 1 :])]

        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(place, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_rows(rows: int, mesh: Mesh, key: str) -> None:
    """Raises `UserError` unless `rows`, the value of config key `key`, divides over the data axes."""
    shards = row_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.{key} is {rows}, which the mesh's data × fsdp = {shards} does not divide; use a multiple of {shards}"
        )
