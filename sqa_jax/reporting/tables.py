"""Tables as plain text or Markdown, and the leaderboard's table of several systems on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqa_jax.data.problem import Problem
from sqa_jax.metrics.intervals import accuracy_interval, mcnemar, paired_difference
from sqa_jax.metrics.leaderboard import COLUMNS, correctness, score
from sqa_jax.reporting.format import percent


def comparison(problems: Sequence[Problem], systems: Mapping[str, Mapping[str, int | None]], markdown: bool) -> str:
    """Accuracies of systems {name: predictions} with 95 % intervals, and the last one's paired difference from the first."""
    header = ["system", *COLUMNS, "95 % interval", "unparsed"]
    rows = []
    for name, predictions in systems.items():
        metrics, right = score(problems, predictions, name), correctness(problems, predictions, name)
        interval = accuracy_interval(right)
        rows.append(
            [
                name,
                *(percent(metrics[column]) for column in COLUMNS),
                f"{100 * interval.low:.1f}–{100 * interval.high:.1f}",
                str(metrics["unparsed"] + metrics["missing"]),
            ]
        )
    counts = score(problems, {}, "")["n"]
    rows.append(["n", *(str(counts[column]) for column in COLUMNS), "", ""])
    text = text_table(header, rows, markdown)
    return f"{text}\n\n{_last_minus_first(problems, systems)}" if len(systems) > 1 else text


def _last_minus_first(problems: Sequence[Problem], systems: Mapping[str, Mapping[str, int | None]]) -> str:
    (first, *_, last) = systems
    before, after = (correctness(problems, systems[name], name) for name in (first, last))
    d = paired_difference(before, after)
    return (
        f"{last} − {first}: {100 * d.value:+.1f} points on the same {len(problems)} questions "
        f"(95 % bootstrap interval {100 * d.low:+.1f} to {100 * d.high:+.1f}; McNemar p = {mcnemar(before, after):.2g})"
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """A table whose first column is aligned left and the others right."""
    if markdown:
        rule = ["---", *["---:"] * (len(header) - 1)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            c.rjust(width) if k else c.ljust(width) for k, (c, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [header, ["-" * width for width in widths], *rows]))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`text_table` as Markdown."""
    return text_table(header, rows, markdown=True)
