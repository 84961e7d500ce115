"""Renders results.json as report.md and as a self-contained report.html: one context, two templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from sqa_jax.agent import report as agent_report
from sqa_jax.files import atomic_write
from sqa_jax.metrics.leaderboard import COLUMNS
from sqa_jax.reporting.format import cell, count, duration, money, percent, points
from sqa_jax.reporting.plot_style import svg
from sqa_jax.reporting.tables import markdown_table
from sqa_jax.study.matrix import NO_ADAPTER
from sqa_jax.study.plots import PLOTS, label

Results = dict[str, Any]  # the content of results.json
Table = tuple[str, list[str], list[list[str]]]  # name, header, rows


def write_report(results: Results, root: Path) -> None:
    """Writes report.md with plots/*.svg beside it, and report.html, which needs no other file."""
    figures: dict[str, tuple[str, str]] = {}  # (title, SVG)
    if any(row["seeds"] for row in results["systems"]):
        figures = {name: (title, svg(draw(results))) for name, (title, draw) in PLOTS.items()}
    if agent := results.get("agent"):
        figures["agent"] = ("Accuracy against cost, with tools", svg(agent_report.accuracy_against_cost(agent)))
    for name, (_, text) in figures.items():
        with atomic_write(root / "plots" / f"{name}.svg") as file:
            file.write(text)
    context = {
        "r": results,
        "plots": {name: figure for name, figure in figures.items() if name != "agent"},
        "agent_plot": figures.get("agent"),
        "tables": _tables(results),
        "markdown_table": markdown_table,
        "verdicts": verdicts(results),
        "label": lambda row: label(row, results),
    }
    environment = _environment()
    for name in ("report.md", "report.html"):
        with atomic_write(root / name) as file:
            file.write(environment.get_template(f"{name}.j2").render(context))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sqa_jax.study"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": count, "money": money, "percent": percent, "cell": cell}
    return environment


def _tables(results: Results) -> dict[str, tuple[list[str], list[list[str]]]]:
    """(header, rows) by name."""
    tables = [
        leaderboard(results), hypothesis_table(results), difference_table(results), adapter_table(results),
        cost_table(results), benchmark_table(results), explanation_table(results), published_table(results),
    ]  # fmt: skip
    if agent := results.get("agent"):
        tables += [(f"agent_{name}", *table) for name, table in agent_report.tables(agent).items()]
    return {name: (header, rows) for name, header, rows in tables}


def leaderboard(results: Results) -> Table:
    rows = []
    for row in results["systems"]:
        if row["seeds"]:
            spread = "" if row["spread"] is None else f"{row['spread']:.1f}"
            rows.append(
                [
                    label(row, results),
                    *(percent(row["columns"][c]) for c in COLUMNS),
                    f"{row['low']:.1f}–{row['high']:.1f}",
                    str(row["seeds"]),
                    spread,
                    str(row["unparsed"]),
                ]
            )
        else:
            rows.append([label(row, results), *["–"] * len(COLUMNS), "failed", "0", "", ""])
    for name, value in results["baselines"].items():
        rows.append([name.replace("_", " "), *[""] * (len(COLUMNS) - 1), percent(value), "", "", "", ""])
    n = results["data"]["test"]
    rows.append(["n", *(str(n[c]) for c in COLUMNS), "", "", "", ""])
    return "leaderboard", ["system", *COLUMNS, "95 % interval", "seeds", "sd of seeds", "unparsed"], rows


def hypothesis_table(results: Results) -> Table:
    rows = []
    for row in results["hypotheses"]:
        measured = ["–"] * 6
        if row["verdict"] != "not tested":
            measured = [
                points(row["difference"]), f"{points(row['low'])} to {points(row['high'])}", f"{row['p']:.2g}",
                f"{row['adjusted_p']:.2g}", ", ".join(map(points, row["by_seed"])), f"{100 * row['smallest']:.1f}",
            ]  # fmt: skip
        arms = {**row, "arm": f"{row['second']} − {row['first']}"}
        rows.append([row["name"], label(arms, results), row["verdict"], *measured])
    header = [
        "hypothesis", "comparison", "verdict", "difference", "95 % interval", "p", "p, Holm", "by seed",
        "minimum detectable",
    ]  # fmt: skip
    return "hypotheses", header, rows


def difference_table(results: Results) -> Table:
    subjects = list(dict.fromkeys(row["subject"] for row in results["differences"]))
    table: dict[str, dict[str, str]] = {}
    for row in results["differences"]:
        text = f"{points(row['difference'])} ({points(row['low'])} to {points(row['high'])})"
        table.setdefault(label(row, results), {})[row["subject"]] = text
    rows = [[name, *(cells.get(subject, "–") for subject in subjects)] for name, cells in table.items()]
    return "differences", [f"minus {results['config']['study']['reference']}", *(s or "all" for s in subjects)], rows


def adapter_table(results: Results) -> Table:
    rows = [
        [
            label(row, results), "untrained" if row["minus"] == NO_ADAPTER else row["minus"], row["questions"], str(row["n"]),
            points(row["difference"]), f"{points(row['low'])} to {points(row['high'])}", f"{row['p']:.2g}",
        ]
        for row in results["adapters"]
    ]  # fmt: skip
    return "adapters", ["system", "minus", "questions", "n", "difference", "95 % interval", "p"], rows


def cost_table(results: Results) -> Table:
    header = [
        "system", "teacher replies", "teacher tokens in / out", "teacher price", "training tokens", "training FLOPs", "training time",
        "machine price", "tokens an answer", "FLOPs an answer", "test time",
    ]  # fmt: skip
    rows = []
    hourly = results["config"]["study"]["device_price"]
    for row in results["systems"]:
        if not row["seeds"]:
            continue
        training, teacher, inference = row.get("training"), row.get("teacher"), row["inference"]
        mark = "≈ " if teacher and teacher["estimated"] else ""
        rows.append(
            [
                label(row, results),
                count(teacher["replies"]) if teacher else "0",
                f"{mark}{count(teacher['prompt_tokens'])} / {count(teacher['output_tokens'])}" if teacher else "0 / 0",
                f"{mark}{money(teacher['price'])}" if teacher else money(0.0),
                count(training["tokens"]) if training else "0",
                f"{training['flops']:.2g}" if training else "0",
                duration(training["seconds"]) if training else "0 s",
                money(training["seconds"] / 3600 * hourly) if training and hourly else "–",
                f"{inference['tokens_read']:.0f} prompt, {inference['tokens_written']:.0f} generated",
                f"{inference['flops']:.2g}",
                duration(row["evaluation_seconds"]),
            ]
        )
    return "costs", header, rows


def benchmark_table(results: Results) -> Table:
    rows = []
    for row in results["benchmark"]:
        cost, n = row["cost"], row["metrics"]["n"]["AVG"]
        mark = "≈ " if cost["estimated"] else ""
        price = None if cost["price"] is None else 1000 * cost["price"] / n
        rows.append(
            [
                f"{row['system']}, {row['setting']}, {row['form']}",
                *(percent(row["metrics"][c]) for c in COLUMNS),
                f"{100 * row['low']:.1f}–{100 * row['high']:.1f}",
                str(row["metrics"]["unparsed"]),
                str(n),
                f"{mark}{(cost['prompt_tokens'] + cost['output_tokens']) / n:.0f}",
                f"{mark}{money(price)}",
            ]
        )
    return (
        "benchmark",
        ["model", *COLUMNS, "95 % interval", "unparsed", "n", "tokens an answer", "price of 1,000"],
        rows,
    )


def explanation_table(results: Results) -> Table:
    scored = results["explanations"]["rows"]
    names = list(scored[0]["scores"]) if scored else []
    rows = [[row["system"], str(row["n"]), *(cell(row["scores"][name]) for name in names)] for row in scored]
    return "explanations", ["explanations of", "n", *names], rows


def published_table(results: Results) -> Table:
    """The published leaderboard with this study's systems, by accuracy."""
    published = [(row["accuracy"], row["system"], row["source"]) for row in results["published"]]
    n = results["data"]["test"]["AVG"]
    measured = [
        (row["columns"]["AVG"], label(row, results), f"this study, {n:,} questions")
        for row in results["systems"]
        if row["seeds"]
    ]
    rows = [
        [system, percent(accuracy), source] for accuracy, system, source in sorted(published + measured, reverse=True)
    ]
    return "published", ["system", "AVG", "source"], rows


def verdicts(results: Results) -> list[dict[str, str]]:
    """The verdict on each hypothesis, without its numbers."""
    fields = ("name", "statement", "verdict", "why", "adapter", "student")
    return [{field: row[field] for field in fields} for row in results["hypotheses"]]
