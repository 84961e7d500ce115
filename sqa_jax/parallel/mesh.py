"""The device mesh: (data, fsdp, tensor)."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sqa_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch is split over both: fsdp shards the parameters *and* the data


def make_mesh(settings, devices=None) -> Mesh:
    """A mesh of all devices in the shape of `config.mesh`, where one -1 stands for what is left.

    Raises:
      UserError: the shape does not use exactly the devices that there are.
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
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over the data axes, behind `leading` unsharded dimensions."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_rows(rows: int, mesh: Mesh, key: str) -> None:
    """Raises `UserError` unless `rows`, which config key `key` set, can be dealt over the data axes."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise UserError(
            f"config.{key} is {rows}, which the mesh's data × fsdp = {shards} does not divide; use a multiple of {shards}"
        )
