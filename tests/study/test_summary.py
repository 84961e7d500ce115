"""From finished and failed runs to tables and verdicts, on answers written by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from sqa_jax.data.problem import ImageFile, Problem
from sqa_jax.metrics.paired_tests import holm
from sqa_jax.study.comparisons import adapter_differences, agreement, arm_differences, hypothesis_tests
from sqa_jax.study.matrix import StudyRun
from sqa_jax.study.summary import example_questions
from sqa_jax.study.systems import System, load_systems, summarize_system

IMAGE = ImageFile("none", bytes)
PROBLEMS = [
    Problem(
        str(k), "Which?", ("a", "b"), k % 2, subject=("natural science", "social science")[k % 3 == 0], grade="grade3"
    )
    for k in range(40)
]


def made(right, seeds=None, failed=()):
    """A system with the given correctness [S, n]."""
    right = np.atleast_2d(np.asarray(right, float))
    answers = np.where(right > 0, [p.answer for p in PROBLEMS], [1 - p.answer for p in PROBLEMS])
    seeds = range(len(right)) if seeds is None else seeds
    return System(right, answers, [{"seed": seed} for seed in seeds], list(failed))


def some(rng, share, seeds=1):
    return (rng.random((seeds, len(PROBLEMS))) < share).astype(float)


NOTHING = System(np.zeros((0, 40)), np.zeros((0, 40), int), [], [(0, "out of memory"), (1, "loss nan")])


def hypotheses(systems, over_seeds=False):
    rows = hypothesis_tests({("s", arm, "lora"): system for arm, system in systems.items()}, PROBLEMS, over_seeds)
    return {row["name"]: row for row in rows}


def test_holm_is_over_what_could_be_tested():
    """A hypothesis without its runs takes no part in the family, and says what it lacks."""
    rng = np.random.default_rng(0)
    shares = {"golden": 0.8, "teacher_answer": 0.5, "teacher_and_golden": 0.6, "teacher_cot": 0.7}
    systems = {arm: made(some(rng, share)) for arm, share in shares.items()}
    rows = hypotheses({**systems, "mistakes": NOTHING})
    tested = [rows[name] for name in ("H3.1", "H3.2", "H3.3")]
    assert [row["adjusted_p"] for row in tested] == pytest.approx(holm([row["p"] for row in tested]))
    assert {name for name, row in rows.items() if row["verdict"] == "not tested"} == {"H3.4", "H3.5", "H3.6"}
    assert rows["H3.4"]["why"] == "arm teacher_lecture is not part of this study"
    assert rows["H3.5"]["why"].endswith("; arm mistakes failed: out of memory")


def test_every_adapter_and_student_is_a_family_member():
    rng = np.random.default_rng(1)
    systems = {
        (student, arm, adapter): made(some(rng, 0.5))
        for student in ("s", "t") for adapter in ("lora", "prefix") for arm in ("golden", "teacher_answer")
    }  # fmt: skip
    systems["s", "zero_shot", "none"] = made(some(rng, 0.5))
    rows = [row for row in hypothesis_tests(systems, PROBLEMS, False) if row["name"] == "H3.1"]
    assert [(row["student"], row["adapter"]) for row in rows] == [
        ("s", "lora"), ("s", "prefix"), ("t", "lora"), ("t", "prefix"),
    ]  # fmt: skip
    assert [row["adjusted_p"] for row in rows] == pytest.approx(holm([row["p"] for row in rows]))


def test_soft_prompts_are_a_hypothesis_of_students_that_see():
    """H2 is tested for soft methods of a student that sees, against it untrained; on images alone, by hand."""
    rng = np.random.default_rng(2)
    shares = {("zero_shot", "none"): 0.3, ("golden", "prompt"): 0.9, ("golden", "lora"): 0.9}
    seen, blind = ({(name, *key): made(some(rng, share)) for key, share in shares.items()} for name in ("v", "t"))
    for system in seen.values():
        system.records[0]["sees"] = True
    pictured = [dataclasses.replace(p, image=IMAGE if k % 4 == 0 else None) for k, p in enumerate(PROBLEMS)]
    rows = [row for row in hypothesis_tests({**seen, **blind}, pictured, False) if row["soft"]]
    assert {(row["student"], row["adapter"]) for row in rows} == {("v", "prompt")}
    by_name = {row["name"]: row for row in rows}
    first, second = seen["v", "zero_shot", "none"].correct, seen["v", "golden", "prompt"].correct
    assert by_name["H2"]["difference"] == pytest.approx(second.mean() - first.mean())
    assert by_name["H2, images"]["difference"] == pytest.approx(second[:, ::4].mean() - first[:, ::4].mean())
    assert by_name["H2, images"]["n"] == 10 and by_name["H2, teacher"]["verdict"] == "not tested"
    found = {(r["adapter"], r["minus"], r["questions"]): r for r in adapter_differences(seen, pictured, False)}
    assert set(found) == {
        (adapter, minus, questions)
        for adapter, minus in (("prompt", "none"), ("lora", "none"), ("lora", "prompt"))
        for questions in ("all", "with an image")
    }
    assert found["lora", "none", "all"]["p"] < 0.01


def test_a_large_difference_is_decided_and_the_signs_are_the_statements():
    low, high = np.zeros((1, 40)), np.ones((1, 40))
    low[0, :8], high[0, -2:] = 1, 0
    rows = hypotheses({"golden": made(high), "teacher_answer": made(low), "teacher_cot": made(high)})
    assert rows["H3.1"]["verdict"] == "supported" and rows["H3.1"]["difference"] == pytest.approx(-0.75)
    assert rows["H3.3"]["verdict"] == "supported" and rows["H3.3"]["difference"] == pytest.approx(+0.75)
    rows = hypotheses({"golden": made(low), "teacher_answer": made(high), "teacher_cot": made(low)})
    assert rows["H3.1"]["verdict"] == rows["H3.3"]["verdict"] == "contradicted"


def test_a_failed_seed_is_left_out_and_the_others_keep_their_partners():
    rng = np.random.default_rng(2)
    first, second = some(rng, 0.4, 3), some(rng, 0.6, 2)
    systems = {"golden": made(first), "teacher_answer": made(second, seeds=(0, 2), failed=[(1, "loss nan")])}
    row = hypotheses(systems, over_seeds=True)["H3.1"]
    expected = [second[0].mean() - first[0].mean(), second[1].mean() - first[2].mean()]
    assert row["by_seed"] == pytest.approx(expected) and row["verdict"] != "not tested"
    alone = {**systems, "teacher_answer": made(second[:1], failed=[(1, "loss nan"), (2, "loss nan")])}
    row = hypotheses(alone, over_seeds=True)["H3.1"]
    assert row["verdict"] == "not tested" and "fewer than two finished" in row["why"]
    assert hypotheses(alone, over_seeds=False)["H3.1"]["verdict"] != "not tested"


def test_differences_are_to_the_reference_of_the_same_adapter_and_by_subject():
    rng = np.random.default_rng(3)
    systems = {
        ("s", "zero_shot", "none"): made(some(rng, 0.3)),
        **{
            ("s", arm, adapter): made(some(rng, 0.5, 2))
            for adapter in ("lora", "full")
            for arm in ("golden", "mistakes")
        },
        ("s", "teacher_cot", "lora"): NOTHING,
    }
    rows = arm_differences(systems, PROBLEMS, "golden", True)
    assert {(row["arm"], row["adapter"]) for row in rows} == {
        ("zero_shot", "none"),
        ("mistakes", "lora"),
        ("mistakes", "full"),
    }
    for row in rows:
        base = systems["s", "golden", "lora" if row["adapter"] == "none" else row["adapter"]]
        own = [not row["subject"] or p.subject == row["subject"] for p in PROBLEMS]
        system = systems["s", row["arm"], row["adapter"]]
        assert row["n"] == sum(own)
        assert row["difference"] == pytest.approx(system.correct[:, own].mean() - base.correct[:, own].mean())
        assert row["low"] <= row["difference"] <= row["high"]


def test_agreement_counts_equal_options():
    right, other = np.ones((1, 40)), np.ones((1, 40))
    other[0, :10] = 0
    found = agreement({("s", "a", "lora"): made(right), ("s", "b", "lora"): made(other), ("s", "c", "lora"): NOTHING})
    assert [name[1] for name in found["names"]] == ["a", "b"]
    assert found["share"] == [[1.0, 0.75], [0.75, 1.0]]


def write_run(root, run, answers):
    folder = run.folder(root) / "eval" / "test"
    folder.mkdir(parents=True)
    rows = [{"pid": p.pid, "answer": a, "text": f"seed {run.seed}"} for p, a in zip(PROBLEMS, answers, strict=True)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_become_systems_and_examples_are_of_a_seed_that_finished(tmp_path):
    """The first seed failed: what is shown of the arm is the second's."""
    runs = [StudyRun("random:tiny", "golden", "lora", seed) for seed in (0, 1)]
    write_run(tmp_path, runs[1], [p.answer if k < 30 else None for k, p in enumerate(PROBLEMS)])
    records = [{"status": "failed", "error": "loss nan", "seed": 0}, {"status": "finished", "seed": 1}]
    systems = load_systems(runs, records, tmp_path, PROBLEMS, "test")
    system = systems["random-tiny", "golden", "lora"]
    assert system.correct.shape == (1, 40) and system.correct.sum() == 30 and system.failed == [(0, "loss nan")]
    assert (system.answers[0, 30:] == -1).all()
    shown = example_questions(systems, runs, tmp_path, PROBLEMS, "test")
    assert shown and all(reply["text"] == "seed 1" for row in shown for reply in row["replies"])
    assert {row["replies"][0]["right"] for row in shown} == {True, False}


def test_a_study_of_which_everything_failed_has_tables(tmp_path):
    runs = [StudyRun("random:tiny", "golden", "lora", 0)]
    systems = load_systems(runs, [{"status": "failed", "error": "no", "seed": 0}], tmp_path, PROBLEMS, "test")
    (key,) = systems
    assert summarize_system(key, systems[key], PROBLEMS, False)["failed"] == [(0, "no")]
    assert all(row["verdict"] == "not tested" for row in hypothesis_tests(systems, PROBLEMS, False))
    assert example_questions(systems, runs, tmp_path, PROBLEMS, "test") == []
    assert agreement(systems) == {"names": [], "share": []}
    assert arm_differences(systems, PROBLEMS, "golden", False) == []
