"""The parameters of a run as a table: name, shape, type, sharding, count, trained or frozen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from sqa_jax.parallel.rules import path_name


class _Row(NamedTuple):
    group: str
    name: str
    shape: str
    dtype: str
    sharding: str
    count: int
    status: str


def parameter_overview(trained: Any, frozen: Any) -> tuple[str, str]:
    """(table, summary): a line per parameter with subtotals by top-level module; and the totals in one line.

    Scanned layers are one parameter with a leading dimension of layers; layers that are a list of parameters of one
    shape share a line, too.

    Args:
      trained, frozen: trees of arrays on devices; `frozen` is {} where everything is trained.
    """
    rows = [*_rows(trained, "trained"), *_rows(frozen, "frozen")]
    total = {status: sum(row.count for row in rows if row.status == status) for status in ("trained", "frozen")}
    summary = (
        f"{sum(total.values()):,} parameters: {total['trained']:,} trained "
        f"({100 * total['trained'] / max(1, sum(total.values())):.2f} %), {total['frozen']:,} frozen"
    )
    lines: list[tuple[str, ...]] = [("name", "shape", "dtype", "sharding", "count", "")]
    for group in dict.fromkeys((row.group, row.status) for row in rows):
        members = [row for row in rows if (row.group, row.status) == group]
        lines.append((group[0], "", "", "", f"{sum(row.count for row in members):,}", group[1]))
        lines += [(f"  {row.name}", *row[2:5], f"{row.count:,}", row.status) for row in members]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<<<<><", widths, strict=True))
    table = "\n".join(form.format(*line).rstrip() for line in lines)
    return f"{table}\n\n{summary}\n", summary


def _rows(tree: Any, status: str) -> Iterator[_Row]:
    """The parameters of a tree; those that differ in a layer's number only are one row."""
    merged: dict[tuple[str, ...], list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = re.sub(r"(?<=/)\d+(?=/)", "*", path_name(path))
        key = (name, "×".join(map(str, leaf.shape)) or "scalar", str(leaf.dtype), _spec(leaf))
        merged.setdefault(key, []).append(leaf.size)
    for (name, shape, dtype, sharding), sizes in merged.items():
        group, _, inner = name.partition("/")
        shape = f"{len(sizes)} × {shape}" if len(sizes) > 1 else shape
        yield _Row(group, inner or group, shape, dtype, sharding, sum(sizes), status)


def _spec(leaf: jax.Array) -> str:
    """Which mesh axis shards each dimension, such as "-, fsdp, tensor"; axes of one device shard nothing."""
    sharding = leaf.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return "one device"
    axes = [
        [axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if sharding.mesh.shape[axis] > 1]
        for entry in (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    ]
    return ", ".join("+".join(names) or "-" for names in axes) if any(axes) else "replicated"
