"""Plans as text tables."""

from __future__ import annotations

from typing import Any

from sqa_jax.parallel.chips import GIB
from sqa_jax.parallel.mesh import AXES
from sqa_jax.reporting.format import duration
from sqa_jax.reporting.tables import text_table


def training(row: dict[str, Any]) -> str:
    """The plan of a training step, one fact a line."""
    batch = row["batch"]
    lines = [
        ("mesh", f"{_mesh(row)} ({', '.join(AXES)})"),
        ("batch", f"{batch['rows_per_chip']} rows of {batch['row_length']} tokens a data shard, {batch['accumulate']} "
         f"micro-batches a step: {batch['tokens']:,} tokens"),
        ("trained", f"{row['trained_parameters']:,} of {row['parameters']:,} parameters"),
    ]  # fmt: skip
    if not row["fits"]:
        besides = "" if row["temporaries"] is None else f", temporaries {row['temporaries'] / GIB:.2f} GiB"
        lines.append(("memory", f"does not fit: arguments {row['arguments'] / GIB:.2f} GiB{besides}"))
        return _aligned(lines + [("or" if k else "change", text) for k, text in enumerate(row["advice"])])
    epoch = row["epoch"]
    dollars = {name: price for name, price in epoch["dollars"].items() if price is not None}
    lines += _measurements(row)
    lines += [
        ("donation", "the state is updated in place" if row["donated"] else "none: the state is allocated twice"),
        ("epoch", f"{epoch['tokens']:,.0f} tokens ({epoch['source']}): {duration(epoch['seconds'], 1)}, {epoch['chip_hours']:.3f} "
         "chip-hours" + "".join(f", ${price:.2f} {name.replace('_', ' ')}" for name, price in dollars.items())),
    ]  # fmt: skip
    formula = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in row["expected_sent"].items())
    total = f"by formula {sum(row['expected_sent'].values()) / 1e6:.1f} MB a step ({formula})"
    return f"{_aligned(lines)}\n\n{_communication(row)}\n{total}"


def generation(row: dict[str, Any]) -> str:
    """The plan of the decoding loop, one fact a line."""
    lines = [("generation", f"{row['texts']} texts of {row['new_tokens']} new tokens on {_mesh(row)}")]
    if not row["fits"]:
        return _aligned([*lines, ("memory", "does not fit: lower config.eval.batch_questions or max_new_tokens")])
    return f"{_aligned(lines + _measurements(row))}\n\n{_communication(row)}"


def _measurements(row: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, gib = row["seconds"], {name: size / GIB for name, size in row["memory"].items()}
    percent = {name: f"{100 * part:.1f} %" for name, part in row["utilization"].items()}
    lines = [
        ("memory of a chip", f"{gib['peak']:.2f} of {gib['chip']:.0f} GiB: arguments {gib['arguments']:.2f}, temporaries "
         f"{gib['temporaries']:.2f}, outputs {gib['outputs']:.2f} of which {gib['donated']:.2f} reuse arguments, code {gib['code']:.2f}"),
        ("time", f"{duration(seconds['estimate'], 1)} by the compiler's cost model"),
        ("at best", f"{duration(seconds['roofline'], 1)}: {seconds['binds']} binds; compute {duration(seconds['compute'], 1)}, memory "
         f"{duration(seconds['memory'], 1)}, communication {duration(seconds['communication'], 1)}"),
        ("cost of a chip", f"{row['flops'] / 1e12:.2f} TFLOP, {row['traffic'] / 1e9:.1f} GB to and from memory"),
        ("utilization", f"{percent['estimate']} model FLOPs utilization (at best {percent['roofline']})"),
        ("speed", f"{row['tokens_per_second']:,.0f} tokens/s"),
    ]  # fmt: skip
    if row["uncounted_kernels"]:
        lines.append(("not counted", f"operations of the kernels {', '.join(row['uncounted_kernels'])}"))
    return lines


def _communication(row: dict[str, Any]) -> str:
    header = ["collective", "over", "count", "payload MB", "sent MB", "time", "overlapped"]
    cells = [
        [c["kind"], c["over"], f"{c['count']:,}", f"{c['payload'] / 1e6:.1f}", f"{c['sent'] / 1e6:.1f}",
         duration(c["seconds"], 1), "yes" if c["overlapped"] else "no"]
        for c in row["collectives"]
    ]  # fmt: skip
    total = f"{sum(c['sent'] for c in row['collectives']) / 1e6:.1f} MB sent by a chip"
    return f"{text_table(header, cells)}\n{total}" if cells else total


def sweep(rows: list[dict[str, Any]], markdown: bool = False) -> str:
    """A sweep: one line for each plan that fits, then the others by reason."""
    header = ["mesh", "rows", "micro-batches", "GiB", "step", "at best", "binds", "util %", "tokens/s", "sent MB", "chip-hours"]  # fmt: skip
    cells, failed = [], {}
    for row in rows:
        size = row["batch"]["rows_per_chip"]
        if not row["fits"]:
            failed.setdefault((row["why"], _mesh(row)), []).append(size)
            continue
        seconds = row["seconds"]
        cells.append([
            _mesh(row), str(size), str(row["batch"]["accumulate"]), f"{row['memory']['peak'] / GIB:.1f}",
            duration(seconds["estimate"], 1), duration(seconds["roofline"], 1), seconds["binds"],
            f"{100 * row['utilization']['estimate']:.1f}", f"{row['tokens_per_second']:,.0f}",
            f"{sum(c['sent'] for c in row['collectives']) / 1e6:.1f}", f"{row['epoch']['chip_hours']:.3f}",
        ])  # fmt: skip
    text = text_table(header, cells, markdown) if cells else "nothing that was compiled fits"
    for (why, mesh), sizes in failed.items():
        text += f"\n{mesh} with {', '.join(map(str, sorted(sizes)))} rows: {why}"
    return f"{text}\n\nmesh: {' × '.join(AXES)}; rows of a data shard in a micro-batch; chip-hours of an epoch"


def _aligned(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def _mesh(row: dict[str, Any]) -> str:
    return "×".join(str(row["mesh"][axis]) for axis in AXES)
