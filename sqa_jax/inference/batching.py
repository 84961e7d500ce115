"""Batching helpers of inference: cache shardings, bin packing, rounding of sizes that are compiled for."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sqa_jax.models.layers.kv_cache import Cache
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.mesh import BATCH, batch_sharding


def cache_shardings(student: StudentConfig, mesh: Mesh) -> Cache:
    """Shardings of a KV cache: batch dimension over the data axes, key/value heads over `tensor` where it divides them.

    Returns:
      A `Cache` with a sharding in place of each array.
    """
    heads = "tensor" if student.num_kv_heads % mesh.shape["tensor"] == 0 else None
    keys, rows = NamedSharding(mesh, PartitionSpec(None, BATCH, heads)), batch_sharding(mesh)
    return Cache(keys, keys, rows, rows)  # pyright: ignore[reportArgumentType]


def first_fit(sizes: Sequence[int], counts: Sequence[int], max_size: int, max_count: int) -> list[list[int]]:
    """Bin packing by first-fit decreasing (Johnson 1974): the indices of the sequences of each row.

    Args:
      sizes: tokens of each sequence, at most `max_size`.
      counts: what each sequence takes of a second resource, at most `max_count`.
      max_size, max_count: capacity of a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        size, count = sizes[index], counts[index]
        row = next((k for k, (tokens, spare) in enumerate(free) if tokens >= size and spare >= count), len(rows))
        if row == len(rows):
            rows.append([])
            free.append((max_size, max_count))
        rows[row].append(index)
        free[row] = (free[row][0] - size, free[row][1] - count)
    return rows


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not less than `size`."""
    return -(-size // multiple) * multiple
