"""The report's plots, each from `results.json` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from sqa_jax.reporting.plot_style import INK, axes_of

Results = dict[str, Any]  # the content of results.json
_COLOURS = (
    "#3366cc",
    "#dc7d1f",
    "#2b9e76",
    "#b8448c",
    "#7a6fd0",
    "#c9a227",
    "#5b6770",
    "#1aa3b8",
    "#a8502f",
    "#6b8e23",
)


def finished(results: Results) -> list[dict[str, Any]]:
    """The systems that have an accuracy."""
    return [row for row in results["systems"] if row["seeds"]]


def label(row: dict[str, Any], results: Results) -> str:
    """A system's name: its arm, with adapter and student where the study has several."""
    parts = [row["arm"]]
    if len({r["adapter"] for r in results["systems"]} - {"none"}) > 1 and row["adapter"] != "none":
        parts.append(row["adapter"])
    if len({r["student"] for r in results["systems"]}) > 1:
        parts.append(row["student"])
    return ", ".join(parts)


def _colour(row: dict[str, Any], results: Results) -> str:
    arms = list(dict.fromkeys(r["arm"] for r in results["systems"]))
    return _COLOURS[arms.index(row["arm"]) % len(_COLOURS)]


def accuracy_by_arm(results: Results) -> Figure:
    """Accuracy of each system with its 95 % interval and seeds; the baselines are vertical lines."""
    rows = finished(results)
    figure, axes = axes_of(7.5, 0.9 + 0.36 * len(rows))
    for height, row in enumerate(reversed(rows)):
        mean = row["columns"]["AVG"]
        axes.plot(
            [row["low"], row["high"]],
            [height, height],
            color=_colour(row, results),
            linewidth=2,
            solid_capstyle="round",
        )
        axes.plot(row["by_seed"], [height] * len(row["by_seed"]), "|", color=INK, markersize=7)
        axes.plot(mean, height, "o", color=_colour(row, results), markersize=7)
        axes.annotate(
            f"{mean:.1f}",
            (row["high"], height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
    for style, (name, value) in zip((":", "--"), results["baselines"].items(), strict=True):
        axes.axvline(
            value, color="#8a949e", linestyle=style, linewidth=1.2, label=f"{name.replace('_', ' ')} {value:.1f}"
        )
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axes.set_yticks(range(len(rows)), [label(row, results) for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.1)
    axes.set_xlabel("accuracy on the test questions, % (line: 95 % interval; ticks: seeds)")
    return figure


def accuracy_against_tokens(results: Results) -> Figure:
    """Validation accuracy during training, where it was measured; validation losses are in results.json."""
    figure, axes = axes_of(7.5, 4.4)
    labelled = set()
    for curve in results["curves"]:
        points = [(p["tokens"], p["val_accuracy"]) for p in curve["points"] if p["val_accuracy"] is not None]
        if len(points) > 1:
            name = label(curve, results)
            axes.plot(
                *zip(*points, strict=True),
                "-o",
                markersize=3,
                linewidth=1.4,
                color=_colour(curve, results),
                label=None if name in labelled else name,
            )
            labelled.add(name)
    for row in finished(results):
        if "training" in row:
            axes.plot(row["training"]["tokens"], row["columns"]["AVG"], "*", markersize=11, color=_colour(row, results))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("accuracy, %")
    axes.set_title(
        "lines: validation questions during training; stars: test questions at the end", fontsize=9, color=INK
    )
    if labelled:
        figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return figure


def accuracy_against_cost(results: Results) -> Figure:
    """Students by FLOPs of an answer; a hosted model, of which only the price is known, is a horizontal line."""
    figure, axes = axes_of(7.5, 4.4)
    for row in finished(results):
        axes.plot(
            row["inference"]["flops"],
            row["columns"]["AVG"],
            "o",
            color=_colour(row, results),
            markersize=7,
            label=label(row, results),
        )
    for row in results["benchmark"]:
        price, n = row["cost"]["price"], row["metrics"]["n"]["AVG"]
        cost = "price unknown" if price is None else f"${1000 * price / n:.2g} for 1,000 answers"
        axes.axhline(row["metrics"]["AVG"], color="#8a949e", linestyle="--", linewidth=0.8)
        axes.annotate(
            f"{row['system']}, {row['setting']} {row['form']}: {cost}", (0.01, row["metrics"]["AVG"]),
            xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points", fontsize=7, color="#5b6770",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel("FLOPs of one answer")
    axes.set_ylabel("accuracy, %")
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return figure


def differences_by_subject(results: Results) -> Figure:
    """Difference of each arm from the reference arm, by subject."""
    rows = results["differences"]
    subjects = [s for s in dict.fromkeys(row["subject"] for row in rows) if s]
    names = list(dict.fromkeys(label(row, results) for row in rows))
    figure, axes = axes_of(7.5, 1.0 + 0.3 * max(1, len(names)) * max(1, len(subjects)) / 1.4)
    for k, subject in enumerate(subjects):
        by_name = {label(row, results): row for row in rows if row["subject"] == subject}
        heights = [names.index(name) + 0.22 * (k - (len(subjects) - 1) / 2) for name in by_name]
        values = [100 * row["difference"] for row in by_name.values()]
        errors = [
            [100 * (r["difference"] - r["low"]) for r in by_name.values()],
            [100 * (r["high"] - r["difference"]) for r in by_name.values()],
        ]
        axes.errorbar(
            values, heights, xerr=errors, fmt="o", markersize=4, linewidth=1.3, color=_COLOURS[k], label=subject
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"points above {results['config']['study']['reference']} (95 % interval)")
    if subjects:
        axes.legend(fontsize=8, frameon=False)
    return figure


def answer_agreement(results: Results) -> Figure:
    """Heat map of how often two systems choose the same option."""
    names = [
        label(dict(zip(("student", "arm", "adapter"), key, strict=True)), results)
        for key in results["agreement"]["names"]
    ]
    share = results["agreement"]["share"]
    size = 1.6 + 0.55 * len(names)
    figure, axes = axes_of(size + 1, size)
    axes.grid(visible=False)
    axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(share):
        for j, value in enumerate(row):
            axes.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else INK
            )
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("same option chosen, % of test questions", fontsize=9, color=INK)
    return figure


PLOTS: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "accuracy_by_arm": ("Accuracy by arm", accuracy_by_arm),
    "accuracy_against_tokens": ("Accuracy against training tokens", accuracy_against_tokens),
    "accuracy_against_cost": ("Accuracy against the cost of an answer", accuracy_against_cost),
    "differences_by_subject": ("Differences by subject", differences_by_subject),
    "answer_agreement": ("Agreement of answers", answer_agreement),
}
