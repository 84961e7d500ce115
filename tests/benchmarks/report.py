"""Medians, ratios and their ranges, as a page of Markdown."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqa_jax.reporting.tables import markdown_table
from tests.benchmarks.process import cores

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # nats a target token, between the first losses of both sides
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "sqa_jax")
_RATES = {
    "train": "training, real tokens/s",
    "likelihood": "likelihood, questions/s",
    "generate": "greedy generation, tokens/s",
}


def machine() -> dict[str, Any]:
    """Processor, memory and versions of what is measured."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # this package, where it is used from a clone
            continue
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "versions": versions,
    }


def markdown(results: dict[str, Any]) -> str:
    """The page: machine and work, a table of both sides, how far they agree, the account of a step, the loader."""
    parts = [_described(results), _sides(results)]
    parts += [_agreement(results)] if set(_RATES) & set(results) else []
    parts += [_account(results["account"])] if "account" in results else []
    parts += [_loader(results["loader"]["ours"])] if "loader" in results else []
    return "\n\n".join(part for part in parts if part) + "\n"


def disagreement(results: dict[str, Any]) -> str:
    """Non-empty if the first losses, before anything is learned, differ by more than rounding explains."""
    ours, theirs = (results["train"][side][0]["losses"][0] for side in ("ours", "theirs"))
    tolerance = TOLERANCE[results["work"]["dtype"]]
    return f"losses of the first step {ours:.6f} and {theirs:.6f}" if not abs(ours - theirs) <= tolerance else ""


def _described(results: dict[str, Any]) -> str:
    where, work, config = results["machine"], results["work"], results["config"]
    lora, student = config["adapter"]["lora"], Path(config["student"]["path"]).name
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB; {work['accelerator']}; {versions}.\n"
        f"{student}: {work['parameters'] / 1e6:.0f}M parameters, {work['dtype']}; LoRA of rank {lora['rank']} on "
        f"{', '.join(lora['targets'])}. A step: {work['examples_per_step']:.1f} examples of {work['tokens_per_example']:.0f} "
        f"tokens ({100 * work['real_tokens_in_rows']:.1f} % of a row is real). Answers: {work['questions']} questions of "
        f"{work['tokens_per_prompt']:.0f} tokens with {work['options_per_question']:.1f} options; generation of "
        f"{config['eval']['max_new_tokens']} tokens in batches of {config['eval']['batch_questions']}."
    )


def _sides(results: dict[str, Any]) -> str:
    """The table of both sides."""
    rows = []
    for name, title in _RATES.items():
        if name not in results:
            continue
        ours, theirs = results[name]["ours"], results[name]["theirs"]
        rows.append(_row(title, ours, theirs, "rate"))
        if grouped := results[name].get("theirs_grouped"):
            rows.append(_row("… theirs grouped by length", ours, grouped, "rate"))
            rows.append(_row("… theirs with our allocator settings", ours, results[name]["theirs_large_pages"], "rate"))
            rows.append(_row("first step from the process's start, s", ours[:1], theirs[:1], "first_step_s"))
            if len(ours) > 1:
                rows.append(_row("… ours compiled before, s", ours[1:], theirs[1:], "first_step_s"))
        rows.append(_row(f"peak memory, {name}, GB", ours, theirs, "peak_bytes", 1e9))
    if not rows:
        return ""
    runs = len(ours)
    head = ["", "sqa_jax", "transformers + PEFT", "ratio (lowest–highest)"]
    return f"Medians of {runs} run{'s' * (runs > 1)} of each side, in turn.\n\n{markdown_table(head, rows)}"


def _row(title: str, ours: Sequence[dict], theirs: Sequence[dict], key: str, unit: float = 1.0) -> list[str]:
    pairs = [(a[key] / unit, b[key] / unit) for a, b in zip(ours, theirs, strict=True)]
    ratios = [a / b for a, b in pairs]
    middle = [_short(statistics.median(side)) for side in zip(*pairs, strict=True)]
    return [title, *middle, f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"]


def _agreement(results: dict[str, Any]) -> str:
    lines = []
    if "train" in results:
        ours, theirs = (results["train"][side][0] for side in ("ours", "theirs"))
        difference = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        norms = max(abs(a / b - 1) for a, b in zip(ours["gradient_norms"], theirs["gradient_norms"], strict=True))
        lines.append(
            f"Loss of the first step {ours['losses'][0]:.6f} and {theirs['losses'][0]:.6f}; of all {len(ours['losses'])} "
            f"steps within {difference:.1e} nats, gradient norms within {100 * norms:.2g} %."
        )
    for name, key in (("likelihood", "answers"), ("generate", "texts")):
        if name in results:
            ours, theirs = (results[name][side][0][key] for side in ("ours", "theirs"))
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            lines.append(f"Same {key}: {same} of {len(ours)}.")
    return "\n".join(lines)


def _account(account: dict[str, list[dict]]) -> str:
    """Seconds, FLOPs and rates of a step's parts."""

    def median(values) -> float:
        return statistics.median(values)

    flops = account["ours"][0]["flops"]
    rate = flops / median(run["seconds"] for run in account["ours"])
    parts = {
        "the forward pass's products alone, XLA": (flops, flops / rate),
        "the same in PyTorch": (flops, median(run["seconds"] for run in account["theirs"])),
    }
    for name in account["parts"][0]["seconds"]:
        seconds = median(run["seconds"][name] for run in account["parts"])
        parts[name] = (account["parts"][0]["flops"].get(name), seconds)
    rows = []
    for name, (count, seconds) in parts.items():
        of = ["", "", ""] if count is None else [_short(count / 1e9), _short(count / seconds / 1e9), f"{count / seconds / rate:.0%}"]  # fmt: skip
        rows.append([name, _short(seconds), *of])
    count, seconds = parts["whole step"]
    head = ["part of a step", "seconds", "GFLOP", "GFLOP/s", "of the products' rate"]
    return (
        f"{markdown_table(head, rows)}\n\nAt the rate of its products alone the step would take {_short(count / rate)} s; "
        f"{_short(seconds - count / rate)} s go elsewhere."
    )


def _loader(runs: Sequence[dict]) -> str:
    loaded, ready, waited = (statistics.median(run[key] for run in runs) for key in ("loaded", "ready", "waited"))
    return (
        f"A step with the loader takes {_short(loaded)} s, with a batch already on the device {_short(ready)} s; "
        f"{1000 * waited:.2f} ms of it wait for the batch."
    )


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
