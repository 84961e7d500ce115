"""Runs policies over questions, each into its own folder, so that no question is answered twice by the same policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.agent.evidence import KINDS, calls_by_records, traces
from sqa_jax.agent.explore import Calibration, States, calibrate, helpful, most_helpful, orders, states_of
from sqa_jax.agent.loop import Agent
from sqa_jax.agent.policies import Constrained, Free, Plan, Policy, random_plan
from sqa_jax.agent.tools import make_tools
from sqa_jax.batches.config_data import config_records, load_config_problems, training_problems
from sqa_jax.config_aliases import original_names
from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import answer_and_score
from sqa_jax.evaluation.student import open_student
from sqa_jax.files import read_jsonl, write_json

POLICIES = ("never", "always", "random", "oracle", "constrained", "free")
# Settings of config.agent that decide no prediction of a policy.
_OUTSIDE_IDENTITY = ("policies", "batch", "evidence", "gain", "chip", "calibrate")


def policy_names(config) -> list[str]:
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


class PolicyRunner:
    """A student with its tools, and the folders under ROOT that hold what it has answered.

    Attributes:
      config: the configuration, with the settings of a PEFT adapter where it names one.
      problem_set: all questions.
      tools: by name.
      student: with its adapter.
    """

    def __init__(self, config, root: Path):
        settings = config.agent
        if settings.evidence not in KINDS:
            raise UserError(f"config.agent.evidence is {settings.evidence!r}; choose one of {', '.join(KINDS)}")
        config = config.copy_and_resolve_references()
        config.eval.checkpoint = "best" if settings.adapter else "none"
        self.root = root
        self.problem_set = load_config_problems(config)
        self.tools = make_tools(config, self.problem_set)
        self.student = open_student(config, Path(settings.adapter))
        self.config = self.student.config
        self._agent = Agent(self.config, self.student.runtime, self.tools)
        self._calibration: Calibration | None = None

    def run_policy(self, name: str, problems: Sequence[Problem], split: str) -> dict[str, Any]:
        """Answers the questions by a policy; returns its metrics."""
        inputs: Any = None  # what the policy was built from
        if name == "never":
            policy: Policy = Plan(lambda problem: ())
        elif name == "always":
            policy = Plan(lambda problem: tuple(self.tools))
        elif name.startswith("only:"):
            policy = Plan(lambda problem: (name.removeprefix("only:"),))
        elif name == "oracle":
            states = self.states(problems, split)
            plans = inputs = {p.pid: helpful(p, states[p.pid]) for p in problems}
            policy = Plan(lambda problem: plans[problem.pid])
        elif name == "constrained":
            inputs = self.calibration().thresholds
            policy = Constrained(inputs)
        elif name == "random":
            inputs = self._call_rates(problems, split)
            policy = Plan(random_plan(inputs, self.config.seed))
        else:
            policy = Free()
        return self._answer(name.replace(":", "-"), policy, problems, split, inputs)

    def rows(self, name: str, split: str) -> dict[str, dict[str, Any]]:
        """A finished policy's rows by pid."""
        file = self.root / split / name.replace(":", "-") / "predictions.jsonl"
        return {row["pid"]: row for row in read_jsonl(file, "predictions")}

    def states(self, problems: Sequence[Problem], split: str) -> dict[str, States]:
        """What the student would answer after every sequence of calls, by pid."""
        rows_of: dict[str, list[dict[str, Any]]] = {problem.pid: [] for problem in problems}
        for order in orders(list(self.tools), self.config.agent.most_calls):
            name = "explore-" + "-".join(order)
            self._answer(name, Plan(lambda problem, order=order: order, score=True), problems, split, order)
            rows = self.rows(name, split)
            for pid, found in rows_of.items():
                found.append(rows[pid])
        return {pid: states_of(found) for pid, found in rows_of.items()}

    def calibration(self) -> Calibration:
        """Thresholds of the constrained policy, chosen on training questions."""
        count = self.config.agent.calibrate
        if count <= 0:
            return Calibration(dict.fromkeys(self.tools, 0.0), float("nan"), float("nan"), float("nan"), 0)
        if self._calibration is None:
            config = self.config.copy_and_resolve_references()
            config.data.train_limit = count
            problems = list(training_problems(config, self.problem_set))
            self._calibration = calibrate(problems, self.states(problems, "calibration"), list(self.tools))
            write_json(self.root / "calibration.json", self._calibration._asdict())
        return self._calibration

    def traces(self) -> Iterator[dict[str, Any]]:
        """Tool dialogues of the training questions to learn from."""
        settings, problems = self.config.agent, list(training_problems(self.config, self.problem_set))
        plans: Mapping[str, Sequence[str]]
        if settings.evidence == "student":
            states = self.states(problems, "traces")
            plans = {p.pid: most_helpful(p, states[p.pid], settings.gain) for p in problems}
        else:
            by_pid: dict[str, list[TeacherRecord]] = {p.pid: [] for p in problems}
            for record in config_records(self.config, self.problem_set):
                by_pid.setdefault(record.pid, []).append(record)
            plans = {p.pid: calls_by_records(p, by_pid[p.pid]) for p in problems}
        return traces(problems, plans, self.tools, settings.tool_timeout)

    def _call_rates(self, problems: Sequence[Problem], split: str) -> dict[str, float]:
        """Share of the questions on which the constrained policy called each tool."""
        rows = self.rows("constrained", split)
        return {tool: sum(tool in row["calls"] for row in rows.values()) / len(problems) for tool in self.tools}

    def _answer(
        self, name: str, policy: Policy, problems: Sequence[Problem], split: str, inputs: Any
    ) -> dict[str, Any]:
        student, settings = self.student, original_names(self.config.agent.to_dict(), "agent")
        identity = {
            **student.identity(self.problem_set, problems),
            "agent": {key: value for key, value in settings.items() if key not in _OUTSIDE_IDENTITY},
            "policy": [name, inputs],
            "step": student.step,
            "tools": [dataclasses.asdict(tool.spec) for tool in self.tools.values()],
        }

        def answer(missing: list[Problem]) -> Iterable[dict[str, Any]]:
            print(f"{split}, {name}", flush=True)
            rows = self._agent(policy, student.adapter, student.base, missing)
            return ({"pid": missing[row.pop("index")].pid, **row} for row in rows)

        folder = self.root / split / name
        return answer_and_score(folder, problems, identity, answer, lambda rows: {"split": split, "policy": name})
