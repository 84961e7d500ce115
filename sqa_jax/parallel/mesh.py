"""The device mesh: (data, fsdp, tensor)."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sqa_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch is split over both: fsdp shards the parameters *and* the data


def make_mesh(settings, devices=None) -> Mesh:
    """A mesh of all devices in the shape of `config.mesh`, where one -1 stands for what is left.

    Neighbours on the mesh are neighbours on a TPU's torus. Between TPU slices there is only the data center's
    network, so `data`, which communicates least, is what goes over them.

    Raises:
      UserError: the shape does not use exactly the devices that there are, or does not divide over their slices.
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
    """Rows over the data axes, behind `leading` unsharded dimensions."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH))


def row_shards(mesh: Mesh) -> int:
    """Parts into which a batch's rows are dealt."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Of a batch's rows, those that the devices of this process hold, ascending; `tensor` may hold them twice."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in slices]))


def place_rows(batch: Any, mesh: Mesh, rows: int, own: np.ndarray | None = None, leading: int = 0) -> Any:
    """A batch from the hosts' memory onto the mesh.

    Args:
      batch: tree of arrays with rows behind `leading` dimensions: all of them on every process, or, with `own`,
        only the process' own.
      rows: of the whole batch.
      own: as `own_rows`.
    """
    sharding = batch_sharding(mesh, leading)
    start_of = {int(row): place for place, row in enumerate(np.arange(rows) if own is None else own)}

    def place(array: np.ndarray) -> jax.Array:
        shape = (*array.shape[:leading], rows, *array.shape[leading + 1 :])

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[leading].indices(rows)
            first = start_of[start]
            return array[(*index[:leading], slice(first, first + stop - start), *index[leading + 1 :])]

        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(place, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_rows(rows: int, mesh: Mesh, key: str) -> None:
    """Raises `UserError` unless `rows`, which config key `key` set, can be dealt over the data axes."""
    shards = row_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.{key} is {rows}, which the mesh's data × fsdp = {shards} does not divide; use a multiple of {shards}"
        )
