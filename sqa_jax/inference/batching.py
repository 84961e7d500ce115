"""Rows: how what is to be read is dealt to them, and where those of a cache lie."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.layers.kv_cache import Cache
from sqa_jax.parallel.mesh import BATCH, batch_sharding


def cache_shardings(student: StudentConfig, mesh: Mesh) -> Cache:
    """A cache's rows over the mesh's data axes, and its key/value heads over `tensor` where that divides them."""
    heads = "tensor" if student.num_kv_heads % mesh.shape["tensor"] == 0 else None
    keys, rows = NamedSharding(mesh, PartitionSpec(None, BATCH, heads)), batch_sharding(mesh)
    return Cache(keys, keys, rows, rows)


def first_fit(sizes: Sequence[int], counts: Sequence[int], length: int, room: int) -> list[list[int]]:
    """Indices of the sequences of each row, each in exactly one: first fit, largest first (Johnson 1974).

    Args:
      sizes: tokens of each sequence, at most `length`.
      counts: what each takes of a second, scarce thing, at most `room`.
      length, room: of a row.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []
    for index in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        size, count = sizes[index], counts[index]
        place = next((k for k, (free, spare) in enumerate(left) if free >= size and spare >= count), len(rows))
        if place == len(rows):
            rows.append([])
            left.append((length, room))
        rows[place].append(index)
        left[place] = (left[place][0] - size, left[place][1] - count)
    return rows
