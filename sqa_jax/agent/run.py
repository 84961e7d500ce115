"""Runs policies over questions, each into a folder of its own, so that nothing is computed twice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.adapters.peft_read import resolve_peft_adapter
from sqa_jax.agent.evidence import KINDS, calls_by_records, traces
from sqa_jax.agent.explore import (
    Calibration,
    States,
    calibrate,
    helpful,
    most_helpful,
    orders,
    states_of,
)
from sqa_jax.agent.loop import Agent
from sqa_jax.agent.policies import Constrained, Free, Plan, at_random
from sqa_jax.agent.tools import make_tools
from sqa_jax.batches.dataset import config_records, load_config_problems, training_problems
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import read_jsonl, write_json
from sqa_jax.inference.predictions import Predictions
from sqa_jax.metrics.leaderboard import read_predictions, score
from sqa_jax.runtime import build_runtime
from sqa_jax.training.restore import restore_adapter
from sqa_jax.training.workdir import check_evaluable

POLICIES = ("never", "always", "random", "oracle", "constrained", "free")


def policies_of(config) -> list[str]:
    """The policies to run, those first that others need.

    Raises:
      UserError: one is not known.
    """
    names = list(dict.fromkeys(config.agent.policies))
    for name in names:
        if name not in POLICIES and name.removeprefix("only:") not in config.agent.tools:
            raise UserError(
                f"config.agent.policies names {name!r}; choose of {', '.join(POLICIES)}, and only:TOOL with a tool of "
                f"config.agent.tools ({', '.join(config.agent.tools)})"
            )
    needed = ["constrained"] if "random" in names and "constrained" not in names else []
    return sorted([*needed, *names], key=lambda name: name == "random")


class Runs:
    """A student with its tools, and what it has answered under ROOT.

    Attributes:
      problems, tools, runtime: as their names say.
    """

    def __init__(self, config, root: Path):
        settings = config.agent
        if settings.evidence not in KINDS:
            raise UserError(f"config.agent.evidence is {settings.evidence!r}; choose one of {', '.join(KINDS)}")
        config, given = (config, None) if settings.adapter else resolve_peft_adapter(config)
        self.config, self.root = config, root
        self.problems = load_config_problems(config)
        self.tools = make_tools(config, self.problems)
        self.runtime = build_runtime(config)
        own = config.copy_and_resolve_references()
        own.eval.checkpoint = "best" if settings.adapter else "none"
        if settings.adapter:
            check_evaluable(settings.adapter, own, self.runtime.student.fingerprint)
        self._step, self._adapter = restore_adapter(own, Path(settings.adapter), self.runtime, given)
        self._made_of = {"peft": given.fingerprint} if given else {}
        self._base = {} if "full" in self._adapter else self.runtime.student.params
        self._agent = Agent(config, self.runtime, self.tools)
        self._calibration: Calibration | None = None

    def policy(self, name: str, problems: Sequence[Problem], split: str) -> dict[str, Any]:
        """Answers the questions by a policy; returns its metrics."""
        made_with: Any = None
        if name == "never":
            policy = Plan(lambda problem: ())
        elif name == "always":
            policy = Plan(lambda problem: tuple(self.tools))
        elif name.startswith("only:"):
            policy = Plan(lambda problem: (name.removeprefix("only:"),))
        elif name == "oracle":
            states = self.states(problems, split)
            plans = made_with = {p.pid: helpful(p, states[p.pid]) for p in problems}
            policy = Plan(lambda problem: plans[problem.pid])
        elif name == "constrained":
            made_with = self.calibration().thresholds
            policy = Constrained(made_with)
        elif name == "random":
            made_with = self._rates(problems, split)
            policy = Plan(at_random(made_with, self.config.seed))
        else:
            policy = Free()
        return self._answer(name.replace(":", "-"), policy, problems, split, made_with)

    def rows(self, name: str, split: str) -> dict[str, dict[str, Any]]:
        """A finished policy's rows by pid."""
        file = self.root / split / name.replace(":", "-") / "predictions.jsonl"
        return {row["pid"]: row for row in read_jsonl(file, "predictions")}

    def states(self, problems: Sequence[Problem], split: str) -> dict[str, States]:
        """What the student would answer after every sequence of calls, by pid."""
        found: dict[str, list[dict[str, Any]]] = {problem.pid: [] for problem in problems}
        for order in orders(list(self.tools), self.config.agent.most_calls):
            name = "explore-" + "-".join(order)
            self._answer(name, Plan(lambda problem, order=order: order, weigh=True), problems, split, order)
            rows = self.rows(name, split)
            for pid, records in found.items():
                records.append(rows[pid])
        return {pid: states_of(records) for pid, records in found.items()}

    def calibration(self) -> Calibration:
        """Thresholds of the constrained policy, chosen by training questions."""
        count = self.config.agent.calibrate
        if count <= 0:
            return Calibration(dict.fromkeys(self.tools, 0.0), float("nan"), float("nan"), float("nan"), 0)
        if self._calibration is None:
            own = self.config.copy_and_resolve_references()
            own.data.train_limit = count
            chosen = list(training_problems(own, self.problems))
            self._calibration = calibrate(chosen, self.states(chosen, "calibration"), list(self.tools))
            write_json(self.root / "calibration.json", self._calibration._asdict())
        return self._calibration

    def traces(self) -> Iterator[dict[str, Any]]:
        """DecodeSlots of the training questions to learn from."""
        settings, chosen = self.config.agent, list(training_problems(self.config, self.problems))
        plans: Mapping[str, Sequence[str]]
        if settings.evidence == "student":
            states = self.states(chosen, "traces")
            plans = {p.pid: most_helpful(p, states[p.pid], settings.gain) for p in chosen}
        else:
            by_pid: dict[str, list] = {p.pid: [] for p in chosen}
            for record in config_records(self.config, self.problems):
                by_pid.setdefault(record.pid, []).append(record)
            plans = {p.pid: calls_by_records(p, by_pid[p.pid]) for p in chosen}
        return traces(chosen, plans, self.tools, settings.tool_timeout)

    def _rates(self, problems: Sequence[Problem], split: str) -> dict[str, float]:
        """How often the constrained policy called each tool."""
        rows = self.rows("constrained", split)
        return {tool: sum(tool in row["calls"] for row in rows.values()) / len(problems) for tool in self.tools}

    def _answer(
        self, name: str, policy: Any, problems: Sequence[Problem], split: str, made_with: Any
    ) -> dict[str, Any]:
        config, runtime = self.config, self.runtime
        settings = {k: v for k, v in config.agent.to_dict().items() if k not in ("policies", "batch", "evidence", "gain", "chip", "calibrate")}  # fmt: skip
        predictions = Predictions(
            self.root / split / name,
            {
                "agent": settings, "recipe": config.recipe.to_dict(), "policy": [name, made_with], "step": self._step,
                "adapter": config.adapter.to_dict() if self._adapter else None, "student": runtime.student.fingerprint,
                "problems": [p.pid for p in problems], "data": self.problems.fingerprint, "seed": config.seed,
                **self._made_of,
                "tools": [dataclasses.asdict(tool.spec) for tool in self.tools.values()],
            },
        )  # fmt: skip
        if predictions.metrics is not None:
            return predictions.metrics
        missing = predictions.missing(problems)
        started = time.perf_counter()
        if missing:
            answered = self._agent(policy, self._adapter, self._base, missing)
            print(f"{split}, {name}", flush=True)
            predictions.collect(({"pid": missing[row.pop("index")].pid, **row} for row in answered), len(problems))
        seconds = time.perf_counter() - started
        predictions.write(problems)
        metrics = score(problems, read_predictions(predictions.file), str(predictions.file))
        rate = round(len(missing) / seconds, 3) if missing else None
        return predictions.finish({**metrics, "split": split, "policy": name, "questions_per_second": rate})
