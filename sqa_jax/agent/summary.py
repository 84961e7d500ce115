"""results.json from the policies' rows: accuracy and cost of each policy, paired tests, effects of tool calls."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sqa_jax.agent.retrieval import Index, recall
from sqa_jax.agent.run import PolicyRunner
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.errors import UserError
from sqa_jax.metrics.costs import chip_prices, teacher_cost
from sqa_jax.metrics.intervals import accuracy_interval
from sqa_jax.metrics.leaderboard import correctness, score
from sqa_jax.metrics.paired_tests import compare, holm
from sqa_jax.parallel.chips import CHIPS
from sqa_jax.teach.prompts import prompt_of_record
from sqa_jax.teach.recorded_models import chance, existing_models


def summarize(
    runner: PolicyRunner, problems: Sequence[Problem], split: str, metrics: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What results.json holds.

    Args:
      metrics: of each policy, as in its metrics.json.
    """
    config = runner.config
    rows = {name: runner.rows(name, split) for name in metrics}
    right = {
        name: correctness(problems, {pid: row["answer"] for pid, row in by_pid.items()}, name)
        for name, by_pid in rows.items()
    }
    price_of_flop = _price_of_flop(config)
    systems = [_system(name, rows[name], right[name], metrics[name], price_of_flop) for name in metrics]
    models = _models(config, runner.problem_set, problems)
    return {
        "split": split,
        "data": {"name": runner.problem_set.name, "n": metrics[next(iter(metrics))]["n"]},
        "student": runner.student.runtime.student.name,
        "adapter": config.agent.adapter,
        "form": _form(rows),
        "retrieval": config.agent.retrieval,
        "recall": _recall(runner, problems),
        "chip": list(config.agent.chip),
        "calibration": runner.calibration()._asdict() if "constrained" in metrics else None,
        "systems": systems,
        "models": [{k: v for k, v in model.items() if k != "right"} for model in models],
        "chance": round(100 * chance(problems), 2),
        "comparisons": _comparisons(problems, right, models),
        "calls": _calls(problems, rows, right),
        "pareto": pareto(systems, models),
    }


def _price_of_flop(config) -> float | None:
    """US dollars of one floating-point operation on `config.agent.chip`, None where the chip's price is not known."""
    kind, utilization = config.agent.chip
    if kind not in CHIPS:
        raise UserError(f"config.agent.chip names {kind!r}; choose one of {', '.join(CHIPS)}")
    hourly, _ = chip_prices(config.plan.prices, kind)
    return hourly / 3600 / (CHIPS[kind].flops * utilization) if hourly and utilization > 0 else None


def _system(
    name: str,
    rows: Mapping[str, Mapping[str, Any]],
    right: Sequence[bool],
    metrics: Mapping[str, Any],
    price: float | None,
) -> dict[str, Any]:
    """A policy's entry: accuracy, and per question its calls, tokens and cost."""
    interval, by_question = accuracy_interval(right), list(rows.values())

    def mean(value) -> float:
        return float(np.mean([value(row) for row in by_question]))

    flops = mean(lambda row: row["flops"])
    tools = sorted({tool for row in by_question for tool in row["calls"]})
    statuses = collections.Counter(row["status"] for row in by_question)
    truncated = collections.Counter(part for row in by_question for part in row["shortened"])
    return {
        "policy": name, "columns": {c: metrics[c] for c in metrics["n"]}, "low": 100 * interval.low, "high": 100 * interval.high,
        "calls": {tool: mean(lambda row, tool=tool: tool in row["calls"]) for tool in tools},
        "read": mean(lambda row: row["read"]), "weighed": mean(lambda row: row["branched"]),
        "written": mean(lambda row: row["written"]), "flops": flops,
        "price_of_1000": None if price is None else 1000 * flops * price,
        "questions_per_second": metrics["questions_per_second"],
        "mistakes": sum(len(row["mistakes"]) for row in by_question), "statuses": dict(statuses), "shortened": dict(truncated),
    }  # fmt: skip


def _models(config, problem_set: ProblemSet, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Recorded replies of big models (`config.study.benchmark`) on these questions."""
    known, found = {problem.pid: problem for problem in problems}, []
    for model in existing_models(config, problem_set):
        records = {record.pid: record for record in model["records"] if record.pid in known}
        if not records:
            continue
        answered = [known[pid] for pid in records]
        answers = {pid: record.answer for pid, record in records.items()}
        right = dict(zip(records, correctness(answered, answers), strict=True))
        interval = accuracy_interval(list(right.values()))
        cost = teacher_cost(zip(answered, records.values(), strict=True), config.teach.prices, prompt_of_record)
        price = None if cost["price"] is None else 1000 * cost["price"] / len(answered)
        metrics = score(answered, answers)
        found.append(
            {
                "system": f"{model['system']}, {model['setting']} {model['form']}", "columns": {c: metrics[c] for c in metrics["n"]},
                "n": len(answered), "low": 100 * interval.low, "high": 100 * interval.high, "price_of_1000": price,
                "tokens": (cost["prompt_tokens"] + cost["output_tokens"]) / len(answered), "estimated": cost["estimated"], "right": right,
            }
        )  # fmt: skip
    return found


def _comparisons(
    problems: Sequence[Problem], right: Mapping[str, Sequence[bool]], models: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each policy that decides against each baseline and each model, on the same questions, with Holm's correction."""
    deciding = [name for name in ("constrained", "free") if name in right]
    found = []
    for name in deciding:
        ours = np.asarray(right[name], float)
        for other in right:
            if other != name:
                found.append(_compared(name, other, ours, np.asarray(right[other], float)))
        for model in models:
            shared = [k for k, problem in enumerate(problems) if problem.pid in model["right"]]
            theirs = np.asarray([model["right"][problems[k].pid] for k in shared], float)
            found.append(_compared(name, model["system"], ours[shared], theirs))
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["adjusted_p"] = adjusted
    return found


def _compared(name: str, other: str, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    result = dataclasses.asdict(compare(theirs[None], ours[None], over_seeds=False))
    return {"first": other, "second": name, **{k: v for k, v in result.items() if k != "by_seed"}}


def _calls(
    problems: Sequence[Problem], rows: Mapping[str, Mapping[str, Any]], right: Mapping[str, Sequence[bool]]
) -> list[dict[str, Any]]:
    """Of each policy, tool and subject: how often the tool was called, and to what effect.

    "sensible": called where it has a result (an image, a lecture); "missed": not called there. "better" and "worse":
    called, and the answer is right, or wrong, where it was the opposite without calls.
    """
    if "never" not in right:
        return []
    has = {"describe_image": lambda p: bool(p.image and p.caption), "retrieve": lambda p: bool(p.lecture.strip())}
    found = []
    for name, by_pid in rows.items():
        for tool in sorted({tool for row in by_pid.values() for tool in row["calls"]}):
            for subject in ["", *sorted({p.subject for p in problems if p.subject})]:
                indices = [k for k, p in enumerate(problems) if subject in ("", p.subject)]
                called = [k for k in indices if tool in by_pid[problems[k].pid]["calls"]]
                before, after = right["never"], right[name]
                found.append(
                    {
                        "policy": name, "tool": tool, "subject": subject, "n": len(indices), "called": len(called),
                        "sensible": sum(has[tool](problems[k]) for k in called) if tool in has else None,
                        "missed": sum(has[tool](problems[k]) for k in indices if k not in set(called)) if tool in has else None,
                        "better": sum(after[k] and not before[k] for k in called),
                        "worse": sum(before[k] and not after[k] for k in called),
                    }
                )  # fmt: skip
    return found


def _recall(runner: PolicyRunner, problems: Sequence[Problem]) -> dict[str, Any] | None:
    """Recall of BM25 over the training lectures, whichever retrieval is used; None where there are no lectures."""
    try:
        return recall(Index(runner.problem_set.split(runner.config.data.train_split)), problems)
    except UserError:
        return None


def _form(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return next((row["form"] for by_pid in rows.values() for row in by_pid.values()), "")


def pareto(systems: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names on the Pareto front of accuracy and price; systems without a known price are left out."""
    points = [(row["price_of_1000"], row["columns"]["AVG"], row["policy"]) for row in systems]
    points += [(row["price_of_1000"], row["columns"]["AVG"], row["system"]) for row in models]
    known = [point for point in points if point[0] is not None]
    return [
        name
        for price, accuracy, name in known
        if not any((p <= price and a > accuracy) or (p < price and a >= accuracy) for p, a, _ in known)
    ]
