"""Paired comparisons between systems: the hypotheses with Holm's correction, adapters, arms, and agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sqa_jax.data.problem import Problem
from sqa_jax.metrics.paired_tests import Comparison, compare, holm
from sqa_jax.study.hypotheses import HYPOTHESES, Hypothesis, verdict
from sqa_jax.study.matrix import NO_ADAPTER, ZERO_SHOT
from sqa_jax.study.systems import Key, System

Systems = Mapping[Key, System]
Row = dict[str, Any]


def hypothesis_tests(systems: Systems, problems: Sequence[Problem], over_seeds: bool) -> list[Row]:
    """Every hypothesis for each student and adapter, with Holm's correction over all that could be tested."""
    tested: list[tuple[Row, Hypothesis, Comparison]] = []
    untested: list[Row] = []
    with_image = _with_image(problems)
    cells = dict.fromkeys((student, adapter) for student, _, adapter in systems if adapter != NO_ADAPTER)
    for student, adapter in cells:
        has_vision = any(system.has_vision for (name, _, _), system in systems.items() if name == student)
        for hypothesis in HYPOTHESES:
            if not hypothesis.applies_to(has_vision, adapter):
                continue
            arms = (hypothesis.first, hypothesis.second)
            keys = [(student, arm, NO_ADAPTER if arm in ZERO_SHOT else adapter) for arm in arms]
            row = {"student": student, "adapter": adapter, **dataclasses.asdict(hypothesis)}
            if reason := _untestable(systems, keys, hypothesis, with_image, over_seeds):
                untested.append({**row, "verdict": "not tested", "why": reason})
                continue
            mask = with_image if hypothesis.images else slice(None)
            first, second = (systems[key] for key in keys)
            tested.append((row, hypothesis, _compare(first, second, over_seeds, mask)))
    adjusted = holm([comparison.p for _, _, comparison in tested])
    rows = []
    for (row, hypothesis, comparison), p in zip(tested, adjusted, strict=True):
        word, why = verdict(hypothesis, comparison, p)
        rows.append({**row, "verdict": word, "why": why, **dataclasses.asdict(comparison), "adjusted_p": p})
    return rows + untested


def _untestable(
    systems: Systems, keys: Sequence[Key], hypothesis: Hypothesis, with_image: np.ndarray, over_seeds: bool
) -> str:
    """Why a hypothesis cannot be tested on two systems; "" where it can."""
    lacking = [key for key in keys if not (key in systems and systems[key].records)]
    if lacking:
        return "; ".join(_lacks(arm, systems.get((student, arm, adapter))) for student, arm, adapter in lacking)
    if hypothesis.images and not with_image.any():
        return "no question of the test has an image"
    # An untrained student is the same with every seed.
    if over_seeds and min(len(systems[key].records) for key in keys if key[2] != NO_ADAPTER) < 2:
        return "seeds are to be resampled, and fewer than two finished"
    return ""


def _lacks(arm: str, system: System | None) -> str:
    if system is None:
        return f"arm {arm} is not part of this study"
    return f"arm {arm} failed: {system.failed[0][1]}"


def adapter_differences(systems: Systems, problems: Sequence[Problem], over_seeds: bool) -> list[Row]:
    """For each student and arm: each adapter minus the untrained student, and minus the adapters named before it.

    On all questions, and on those with an image; exploratory, not corrected for multiple tests.
    """
    rows = []
    with_image = _with_image(problems)
    for (student, arm, adapter), system in systems.items():
        if adapter == NO_ADAPTER or not system.records:
            continue
        others = [key for key in systems if key[0] == student and (key[1] == arm or key[1] == "zero_shot")]
        for other in others[: others.index((student, arm, adapter))]:
            if not systems[other].records:
                continue
            for questions, mask in (("all", slice(None)), ("with an image", with_image)):
                if questions == "all" or with_image.any():
                    comparison = _compare(systems[other], system, over_seeds, mask)
                    row = {
                        "student": student, "arm": arm, "adapter": adapter, "minus": other[2], "questions": questions,
                    }  # fmt: skip
                    rows.append({**row, **dataclasses.asdict(comparison)})
    return rows


def arm_differences(systems: Systems, problems: Sequence[Problem], reference: str, over_seeds: bool) -> list[Row]:
    """Each arm minus the reference arm, over all questions and by subject; exploratory, not corrected.

    The untrained student is compared with the first adapter's reference.
    """
    rows = []
    adapters = list(dict.fromkeys(adapter for _, _, adapter in systems if adapter != NO_ADAPTER))
    for (student, arm, adapter), system in systems.items():
        base = systems.get((student, reference, adapters[0] if adapter == NO_ADAPTER else adapter))
        if arm == reference or not system.records or base is None or not base.records:
            continue
        for subject in ("", *sorted({p.subject for p in problems if p.subject})):
            mask = np.array([not subject or p.subject == subject for p in problems])
            comparison = _compare(base, system, over_seeds, mask)
            row = {"student": student, "arm": arm, "adapter": adapter, "subject": subject}
            rows.append({**row, **dataclasses.asdict(comparison)})
    return rows


def agreement(systems: Systems) -> dict[str, Any]:
    """How often two systems choose the same option (first seed), whether right or wrong: {"names", "share"}."""
    finished = {key: system for key, system in systems.items() if system.records}
    answers = np.array([system.answers[0] for system in finished.values()])
    share = (answers[:, None] == answers[None]).mean(axis=2) if len(answers) else np.zeros((0, 0))
    return {"names": [list(key) for key in finished], "share": share.round(4).tolist()}


def _with_image(problems: Sequence[Problem]) -> np.ndarray:
    return np.array([problem.image is not None for problem in problems], bool)


def _compare(first: System, second: System, over_seeds: bool, mask: np.ndarray | slice) -> Comparison:
    """Compares on the questions of `mask`; a seed that failed in one of the two has no partner in `by_seed`.

    Seeds are resampled where both have several: an untrained student is the same with every seed.
    """
    over_seeds &= min(len(first.records), len(second.records)) > 1
    rows = {record["seed"]: row for row, record in enumerate(first.records)}
    pairs = [(rows[seed], row) for row, record in enumerate(second.records) if (seed := record["seed"]) in rows]
    return compare(first.correct[:, mask], second.correct[:, mask], over_seeds, pairs=pairs)
