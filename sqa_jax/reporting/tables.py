"""Systems side by side: the leaderboard's columns, and the last system's paired difference from the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqa_jax.data.problem import Problem
from sqa_jax.metrics.intervals import accuracy_interval, mcnemar, paired_difference
from sqa_jax.metrics.leaderboard import COLUMNS, correctness, score


def comparison(problems: Sequence[Problem], systems: Mapping[str, Mapping[str, int | None]], markdown: bool) -> str:
    """A table of systems {name: predictions}, the 95 % interval of each average, and the difference of the ends."""
    header = ["system", *COLUMNS, "95 % interval", "unparsed"]
    rows = []
    for name, predictions in systems.items():
        metrics, right = score(problems, predictions, name), correctness(problems, predictions, name)
        cells = ["–" if metrics[column] is None else f"{metrics[column]:.2f}" for column in COLUMNS]
        interval = accuracy_interval(right)
        rows.append(
            [
                name,
                *cells,
                f"{100 * interval.low:.1f}–{100 * interval.high:.1f}",
                str(metrics["unparsed"] + metrics["missing"]),
            ]
        )
    counts = score(problems, {}, "")["n"]
    rows.append(["n", *(str(counts[column]) for column in COLUMNS), "", ""])
    text = markdown_table(header, rows) if markdown else plain_table(header, rows)
    if len(systems) > 1:
        (first, a), (last, b) = list(systems.items())[0], list(systems.items())[-1]
        before, after = correctness(problems, a, first), correctness(problems, b, last)
        d = paired_difference(before, after)
        text += (
            f"\n\n{last} − {first}: {100 * d.value:+.1f} points on the same {len(problems)} questions "
            f"(95 % bootstrap interval {100 * d.low:+.1f} to {100 * d.high:+.1f}; McNemar p = {mcnemar(before, after):.2g})"
        )
    return text


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(
            [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
