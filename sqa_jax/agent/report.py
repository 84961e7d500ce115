"""The comparison of policies as a table and as a page with plots; one question's dialogue as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqa_jax.data.problem import LETTERS, Problem
from sqa_jax.files import atomic_write
from sqa_jax.metrics.leaderboard import COLUMNS
from sqa_jax.reporting.format import count, money, percent, points
from sqa_jax.reporting.plot_style import INK, axes_of, svg
from sqa_jax.reporting.tables import markdown_table, text_table

Results = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]


def table(results: Results) -> str:
    """The policies and models, for a terminal."""
    return text_table(*systems_table(results))


def tables(results: Results) -> dict[str, Table]:
    """(header, rows) of policies and models, of their comparisons, and of calls."""
    return {"systems": systems_table(results), "comparisons": comparisons_table(results), "calls": calls_table(results)}


def write_report(results: Results, folder: Path) -> None:
    """Writes report.md, with plots/accuracy_against_cost.svg beside it."""
    with atomic_write(folder / "plots" / "accuracy_against_cost.svg") as file:
        file.write(svg(accuracy_against_cost(results)))
    with atomic_write(folder / "report.md") as file:
        file.write(section(results))


def section(results: Results) -> str:
    """The page; also a section of the study's report."""
    calibration, recall = results["calibration"], results["recall"]
    retrieval = {"oracle": "the question's gold lecture", "bm25": "the best match of BM25"}[results["retrieval"]]
    parts = [
        "## H1: a small model with tools",
        f"{results['student']}{', adapter ' + results['adapter'] if results['adapter'] else ', zero-shot'}, on "
        f"{results['data']['n']['AVG']} questions of {results['data']['name']} (split `{results['split']}`); dialogues in "
        f"the {results['form']} form; `retrieve` gives {retrieval}. Chance: {results['chance']} %.",
        markdown_table(*systems_table(results)),
        "*Price*: of 1,000 answers; a student's is that of its operations on a "
        f"{results['chip'][0]} chip at {100 * results['chip'][1]:.0f} % of its peak, a model's that of its tokens (≈: estimated "
        f"from the length of the texts). On the Pareto front of accuracy and price: {', '.join(results['pareto']) or 'unknown'}.",
        "![Accuracy against cost](plots/accuracy_against_cost.svg)",
        markdown_table(*comparisons_table(results)) if results["comparisons"] else "",
        "*p, Holm*: McNemar's exact test, corrected over this table. *Minimum detectable*: the difference that so many "
        "questions show four times in five, in points." if results["comparisons"] else "",
        markdown_table(*calls_table(results)) if results["calls"] else "",
        "*Sensible*: called where there is an image, or a lecture. *Better*, *worse*: the answer turned right, or wrong, "
        "compared with never calling." if results["calls"] else "",
    ]  # fmt: skip
    if calibration and calibration["n"]:
        thresholds = ", ".join(f"{name} {value:.2f}" for name, value in calibration["thresholds"].items())
        parts.append(
            f"Thresholds of `constrained`, in nats, chosen by {calibration['n']} training questions: {thresholds} "
            f"({100 * calibration['accuracy']:.1f} % there, never calling {100 * calibration['never']:.1f} %)."
        )
    if recall and recall["n"]:
        found = ", ".join(
            f"{name.replace('recall@', 'the first ')} {recall[name]:.1f} %" for name in recall if "@" in name
        )
        parts.append(
            f"BM25 over the training lectures, for {recall['n']} questions with a lecture: it is in the index for "
            f"{recall['in_index']:.1f} %; among {found}."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def systems_table(results: Results) -> Table:
    header = ["policy", *COLUMNS, "95 % interval", "calls", "prompt tokens", "branch tokens", "generated", "GFLOP", "questions/s", "price", "status"]  # fmt: skip
    rows = []
    for row in results["systems"]:
        calls = ", ".join(f"{tool} {100 * share:.0f} %" for tool, share in row["calls"].items()) or "none"
        notes = [f"{n} {status}" for status, n in row["statuses"].items() if status != "ok"]
        notes += [f"{row['mistakes']} mistakes"] * bool(row["mistakes"])
        notes += [f"{n} {part} shortened" for part, n in row["shortened"].items()]
        rate = "" if row["questions_per_second"] is None else f"{row['questions_per_second']:.2f}"
        rows.append(
            [
                row["policy"], *(percent(row["columns"][c]) for c in COLUMNS), f"{row['low']:.1f}–{row['high']:.1f}", calls,
                count(row["read"]), count(row["weighed"]), count(row["written"]), f"{row['flops'] / 1e9:.0f}", rate,
                money(row["price_of_1000"]), ", ".join(notes) or "ok",
            ]
        )  # fmt: skip
    for row in results["models"]:
        mark = "≈ " if row["estimated"] else ""
        rows.append(
            [
                row["system"], *(percent(row["columns"][c]) for c in COLUMNS), f"{row['low']:.1f}–{row['high']:.1f}", "",
                f"{mark}{row['tokens']:.0f} in all", "", "", "", "", f"{mark}{money(row['price_of_1000'])}", f"n = {row['n']}",
            ]
        )  # fmt: skip
    return header, rows


def comparisons_table(results: Results) -> Table:
    header = ["comparison", "n", "points", "95 % interval", "p", "p, Holm", "minimum detectable"]
    rows = [
        [
            f"{row['second']} − {row['first']}", str(row["n"]), points(row["difference"]),
            f"{points(row['low'])} to {points(row['high'])}", f"{row['p']:.2g}", f"{row['adjusted_p']:.2g}",
            f"{100 * row['smallest']:.1f}",
        ]
        for row in results["comparisons"]
    ]  # fmt: skip
    return header, rows


def calls_table(results: Results) -> Table:
    header = ["policy", "tool", "subject", "questions", "called", "sensible", "missed", "better", "worse"]
    names = ("n", "called", "sensible", "missed", "better", "worse")
    rows = [
        [row["policy"], row["tool"], row["subject"] or "all", *("" if row[n] is None else str(row[n]) for n in names)]
        for row in results["calls"]
    ]
    return header, rows


def accuracy_against_cost(results: Results):
    """Accuracy by price, with the Pareto front."""
    figure, axes = axes_of(7.5, 4.6)
    shown = [(r["policy"], r, "o", "#3366cc") for r in results["systems"]]
    shown += [(r["system"], r, "s", "#dc7d1f") for r in results["models"]]
    shown = [entry for entry in shown if entry[1]["price_of_1000"]]
    for name, row, mark, colour in shown:
        x, y = row["price_of_1000"], row["columns"]["AVG"]
        axes.errorbar(
            x, y, [[y - row["low"]], [row["high"] - y]], color=colour, marker=mark, markersize=7, linewidth=1.2
        )
        axes.annotate(name, (x, y), xytext=(7, 4), textcoords="offset points", fontsize=8, color=INK)
    front = sorted((r["price_of_1000"], r["columns"]["AVG"]) for name, r, *_ in shown if name in results["pareto"])
    if front:
        axes.plot(
            *zip(*front, strict=True),
            drawstyle="steps-post",
            color="#8a949e",
            linestyle="--",
            linewidth=1,
            label="Pareto front",
        )
    axes.axhline(
        results["chance"], color="#8a949e", linestyle=":", linewidth=1, label=f"chance {results['chance']:.1f}"
    )
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.12)
    axes.set_xlabel("US dollars for 1,000 answers")
    axes.set_ylabel("accuracy, % (line: 95 % interval)")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def dialogue_text(problem: Problem, row: Mapping[str, Any], policy: str) -> str:
    """One question's dialogue under a policy.

    Args:
      row: of the policy's predictions.jsonl.
    """
    lines = [f"── {policy}: question {problem.pid}", problem.question]
    lines += [f"   context: {problem.hint}"] * bool(problem.hint)
    lines += [f"   ({LETTERS[k]}) {choice}" for k, choice in enumerate(problem.choices)]
    for turn in row["turns"]:
        lines += _turn_lines(turn)
    scores = next((turn["answers"] for turn in reversed(row["turns"]) if "answers" in turn), None)
    if scores:
        best = max(scores)
        options = ", ".join(f"({LETTERS[k]}) {value - best:+.2f}" for k, value in enumerate(scores))
        lines.append(f"options  {options} (nats)")
    verdict = "right" if row["answer"] == problem.answer else f"wrong: it is ({problem.letter})"
    lines.append(f"answers  ({LETTERS[row['answer']]}) {row['text']}  [{verdict}; {row['status']}]")
    lines.append(
        f"         {row['read']} prompt tokens, {row['branched']} branch tokens, {row['written']} generated, "
        f"{row['flops'] / 1e9:.1f} GFLOP"
    )
    return "\n".join(lines)


def _turn_lines(turn: Mapping[str, Any]) -> list[str]:
    lines = []
    if "said" in turn:
        error = f"  ← {turn['error']}" if "error" in turn else ""
        lines.append(f"student  {' '.join(turn['said'].split())!r}{error}")
    if "margins" in turn:
        margins = ", ".join(f"{name} {value:+.2f}" for name, value in turn["margins"].items())
        lines.append(f"scores   {margins} (nats over answering)")
    if "tool" in turn:
        result = " ".join(turn["result"].split())
        result = result if len(result) <= 300 else result[:300] + " …"
        lines.append(f"calls    {turn['tool']}({turn['argument']})")
        lines.append(f"tool     {result or 'nothing'}  [{turn['status']}]")
    return lines
