"""The targets of each arm, on replies written by hand and in the training rows of the sample."""

from __future__ import annotations

import collections
import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.batches.config_data import config_records, encoder_for, load_config_problems
from sqa_jax.batches.dataset import build_or_reuse
from sqa_jax.batches.loader import pack_dataset
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.data.problem import LETTERS, Problem
from sqa_jax.data.teacher_records import TeacherRecord, records_by_pid
from sqa_jax.errors import UserError
from sqa_jax.prompts.recipes import ARMS, Example, Unusable, arm_format, check_recipe, examples

TOKENIZER = byte_tokenizer()
PROBLEM = Problem(
    "7", "Which one barks?", ("cat", "dog", "cow"), 1, lecture="Dogs bark.", solution="Barking is what dogs do."
)
GOLD = "The answer is B. BECAUSE: Barking is what dogs do."


def recipe(arm, **change):
    config = default()
    config.recipe.arm, config.recipe.format = arm, "QCM-AE"
    config.recipe.update(change)
    return config.recipe


def reply(answer, kind="solution", setting="QTCH", text="", **fields):
    """A teacher's usable reply."""
    text = text or f"It says {LETTERS[answer]} with {setting}."
    return TeacherRecord("7", "m", setting, text, answer, **{kind: text}, **fields)


def targets(arm, records=(), problem=PROBLEM, **change):
    by_kind = collections.defaultdict(list)
    for record in records:
        for kind in record.kinds or ("solution", "reasoning"):
            by_kind[kind].append(record)
    made = examples(problem, by_kind, recipe(arm, **change))
    return [one.target if isinstance(one, Example) else one.reason for one in made]


# ---- each arm on replies written by hand


def test_targets_of_each_arm():
    wrong, right = reply(2, text="Cows bark."), reply(1, text="Dogs do.")
    thought = reply(1, "reasoning", text="A dog barks, a cat meows.")
    assert targets("golden") == targets("golden_lecture") == [GOLD]
    assert targets("golden_answer_only") == ["The answer is B."]
    assert targets("teacher_answer", [wrong]) == ["The answer is C. BECAUSE: Cows bark."]
    assert targets("teacher_lecture", [wrong]) == targets("teacher_answer", [wrong])
    assert targets("teacher_and_golden", [wrong]) == [GOLD, "The answer is C. BECAUSE: Cows bark."]
    assert targets("teacher_cot", [thought]) == ["A dog barks, a cat meows.\nThe answer is B."]
    assert targets("domain_text") == ["Dogs bark."]
    after = "\nBarking is what dogs do.\nThe answer is B."
    assert targets("mistakes", [wrong]) == [f"First attempt: C. Cows bark.\nThis is wrong.{after}"]
    assert targets("mistakes", [right]) == [f"First attempt: B. Dogs do.\nThis is right.{after}"]


@pytest.mark.parametrize("style", ["letter", "text", "both"])
def test_a_reasoning_target_ends_with_one_answer(style):
    """What is read from the end finds the teacher's answer in its chain of thought, the right one in a correction."""
    wrong = TeacherRecord("7", "m", "QTCH", "", 0, reasoning="It meows.", solution="Meowing is barking.")
    for arm, answer in (("teacher_cot", 0), ("mistakes", PROBLEM.answer)):
        (target,) = targets(arm, [wrong], answer=style)
        written = {"letter": LETTERS[answer], "text": PROBLEM.choices[answer]}
        written["both"] = f"({written['letter']}) {written['text']}"
        assert target.endswith(f"\nThe answer is {written[style]}.") and target.count("The answer is") == 1


def test_the_prompt_has_the_lecture_once_where_the_arm_has_it():
    for arm, row in ARMS.items():
        for written in ("QCM-AE", "QCML-AE", "QTCH-AE", "QTCHL-AE"):
            inputs = arm_format(recipe(arm, format=written)).inputs
            assert inputs.count("L") == (row.lecture or "L" in written), (arm, written)
    assert {arm for arm, row in ARMS.items() if row.lecture} == {"golden_lecture", "teacher_lecture", "mistakes"}


# ---- filters of replies


replies = st.lists(
    st.builds(reply, st.integers(0, 2), st.just("solution"), st.sampled_from(["QTCH", "QTCHL"])), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(replies)
def test_majority_vote(records):
    """Against a count by hand; ties go to the answer that was recorded first."""
    counts = {answer: sum(r.answer == answer for r in records) for answer in {r.answer for r in records}}
    most = max(counts.values())
    winner = next(r.answer for r in records if counts[r.answer] == most)
    made = targets("teacher_answer", records, vote=True, samples=0)
    assert len(made) == most and all(text.startswith(f"The answer is {LETTERS[winner]}.") for text in made)
    assert targets("teacher_answer", records, vote=True, samples=1) == made[:1]


@settings(max_examples=60, deadline=None)
@given(replies, st.integers(0, 4), st.booleans(), st.booleans())
def test_arms_that_share_replies_keep_the_same_questions(records, samples, vote, right_only):
    """Whatever the filters: an arm with the lecture prefers other replies, but has the same questions."""
    change = {"samples": samples, "vote": vote, "teacher_right_only": right_only}
    made = {}
    for arm in ("golden", "teacher_answer", "teacher_lecture", "mistakes", "teacher_and_golden"):
        by_kind = {"solution": records}
        made[arm] = examples(PROBLEM, by_kind, recipe(arm, require=("solution",), **change))
    usable = {arm: all(isinstance(one, Example) for one in own) for arm, own in made.items()}
    assert len(set(usable.values())) == 1, usable
    if right_only and usable["golden"]:
        assert {one.reply.answer for one in made["mistakes"]} == {PROBLEM.answer}
    if samples:
        assert len(made["teacher_answer"]) <= samples
    if not usable["golden"]:
        assert made["golden"] == [Unusable("7", "config.recipe.require: no usable solution")]


def test_rejection_keeps_only_right_answers():
    records = [reply(0), reply(1, setting="QTCHL"), reply(2)]
    assert targets("teacher_answer", records, teacher_right_only=True, samples=0) == [
        "The answer is B. BECAUSE: It says B with QTCHL."
    ]
    (reason,) = targets("teacher_answer", [reply(0)], teacher_right_only=True)
    assert reason == "teacher's solution: answer is wrong (config.recipe.teacher_right_only)"


def test_replies_to_the_same_prompt_come_first():
    records = [reply(0, setting="QTCH"), reply(1, setting="QTCHL")]
    assert "with QTCH." in targets("teacher_answer", records)[0]
    assert "with QTCHL." in targets("teacher_lecture", records)[0] and "with QTCHL." in targets("mistakes", records)[0]
    assert len(targets("teacher_answer", records, samples=0)) == 2


@pytest.mark.parametrize("status", ["empty", "malformed", "unparsed", "cut_off", "blocked"])
def test_an_unusable_reply_is_counted_by_its_reason(status):
    record = TeacherRecord("7", "m", "QTCH", "", status=status)
    for arm, kind in (("teacher_answer", "solution"), ("teacher_cot", "reasoning"), ("mistakes", "solution")):
        assert targets(arm, [record]) == [f"teacher's {kind}: {status}"]
    assert targets("teacher_answer", [record, reply(1)]) == ["The answer is B. BECAUSE: It says B with QTCH."]
    assert targets("teacher_and_golden", [record]) == [GOLD, f"teacher's solution: {status}"]


def test_other_reasons():
    assert targets("teacher_answer") == ["teacher's solution: no record"]
    assert targets("teacher_cot", [reply(1)]) == ["teacher's reasoning: no record"]
    assert targets("teacher_cot", [TeacherRecord("7", "m", "QTCH", "(1)", 1)]) == [
        "teacher's reasoning: only an answer"
    ]
    assert targets("domain_text", problem=dataclasses.replace(PROBLEM, lecture=" ")) == ["no lecture"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arm": "teacher_sot"}, "config.recipe.arm is 'teacher_sot'; choose one of golden, "),
        ({"require": ("solutions",)}, "config.recipe.require names 'solutions'; choose of solution, reasoning"),
        ({"samples": -1}, "config.recipe.samples is -1"),
        ({"arm": "mistakes"}, "needs a teacher's solution; name files of replies in config.data.teacher"),
        ({"require": ("reasoning",)}, "'golden' needs a teacher's reasoning"),
    ],
)
def test_unusable_recipes_are_refused(change, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_recipe(recipe(**{"arm": "golden"} | change), has_records=False)


# ---- the sample's questions and its simulated teacher, as rows of a dataset


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    config = default()
    config.data.teacher, config.data.train_limit = ("sample",), 60
    config.data.cache = str(tmp_path_factory.mktemp("datasets"))
    config.recipe.format, config.recipe.max_prompt, config.recipe.max_target = "QCM-AE", 4000, 4000
    problems = load_config_problems(config)
    return config, problems, records_by_pid(config_records(config, problems))


def rows(config, problems):
    """(question, decoded prompt, decoded target) of each row that a student is trained on, and the manifest."""
    dataset, _ = build_or_reuse(config, TOKENIZER, problems)
    tokens, prompt_lengths, _, pids = dataset.columns()
    known = problems.all()
    made = [
        (known[pid], TOKENIZER.decode(ids[:n]), TOKENIZER.decode(ids[n:]))
        for ids, n, pid in zip(tokens, prompt_lengths, pids, strict=True)
    ]
    return made, dataset.manifest


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "domain_text"])
def test_rows_of_an_arm(sample, arm):
    """The prompt does not contain the answer; the target is the arm's text and the EOS token."""
    config, problems, by_pid = sample
    config = config.copy_and_resolve_references()
    config.recipe.arm = arm
    made, manifest = rows(config, problems)
    expected = {}
    for problem in problems.split("train"):
        own = examples(problem, by_pid[problem.pid], config.recipe)
        expected[problem.pid] = [one.target for one in own if isinstance(one, Example)]
    assert len(made) == manifest["rows"] > 40
    assert manifest["rows"] + sum(d["rows"] for d in manifest["dropped"].values()) == 60 * len(ARMS[arm].sources)
    end = TOKENIZER.eos_token
    for problem, prompt, target in made:
        assert target.endswith(end) and target.count(end) == 1 and target.removesuffix(end) in expected[problem.pid]
        assert (f"\nLecture: {problem.lecture}" in prompt) == ARMS[arm].lecture
        assert problem.question in prompt and all(choice in prompt for choice in problem.choices)
        other = (problem.answer + 1) % len(problem.choices)
        other_answer = dataclasses.replace(problem, answer=other, solution="something else")
        (asked,) = encoder_for(config, TOKENIZER).encode([other_answer], [arm_format(config.recipe)])
        assert prompt == TOKENIZER.decode(asked.tokens), "the prompt does not depend on the right answer"
        if ARMS[arm].targets == "EA":
            assert re.search(r"The answer is [A-J]\.$", target.removesuffix(end)), target


@pytest.mark.parametrize("arm", list(ARMS))
def test_loss_mask_covers_exactly_the_targets(sample, arm):
    """In packed rows: the tokens under the mask are every row's target, EOS token included."""
    config, problems, _ = sample
    config = config.copy_and_resolve_references()
    config.recipe.arm, config.train.row_length = arm, 4096
    made, _ = rows(config, problems)
    dataset, _ = build_or_reuse(config, TOKENIZER, problems)
    packed = pack_dataset(dataset, config, TOKENIZER.pad_token_id)
    learned, wanted = [], collections.Counter(target for _, _, target in made)
    for k in range(packed.rows_of_epoch(0)):
        row = packed[k]
        mask = row.target_mask > 0
        positions, ids = row.target_positions[mask], row.targets[mask]
        assert (row.tokens[positions + 1] == ids).all() and (
            row.segments[positions + 1] == row.segments[positions]
        ).all()
        for segment in sorted(set(row.segments[positions].tolist())):
            learned.append(TOKENIZER.decode(ids[row.segments[positions] == segment]))
    assert collections.Counter(learned) == wanted


def test_questions_that_all_arms_can_use_are_the_same_in_all(sample):
    config, problems, _ = sample
    questions = {}
    for arm in ("golden", "teacher_answer", "teacher_cot", "mistakes", "golden_answer_only"):
        own = config.copy_and_resolve_references()
        own.recipe.arm, own.recipe.require, own.recipe.teacher_right_only = arm, ("solution", "reasoning"), True
        made, manifest = rows(own, problems)
        questions[arm] = [problem.pid for problem, _, _ in made]
        reasons = manifest["dropped"]
        assert set(reasons) == {
            "config.recipe.require: no usable solution",
            "config.recipe.require: no usable reasoning",
        }
        assert len(made) + sum(reason["rows"] for reason in reasons.values()) == 60
    assert 20 < len(questions["golden"]) < 60 and all(pids == questions["golden"] for pids in questions.values())


def test_rejection_sampling_on_the_simulated_teacher(sample):
    """The teacher is wrong at a known rate; with rejection no target contradicts the data."""
    config, problems, _ = sample
    for right_only in (False, True):
        own = config.copy_and_resolve_references()
        own.recipe.arm, own.recipe.teacher_right_only = "teacher_answer", right_only
        made, manifest = rows(own, problems)
        wrong = sum(not target.startswith(f"The answer is {problem.letter}.") for problem, _, target in made)
        dropped = manifest["dropped"].get("teacher's solution: answer is wrong (config.recipe.teacher_right_only)")
        assert (wrong > 0, dropped is None) == (not right_only, not right_only)


def test_subjects_apply_to_every_arm(sample):
    config, problems, _ = sample
    config = config.copy_and_resolve_references()
    config.data.subjects, config.data.train_limit = ("social science",), 0
    for arm in ("golden", "mistakes", "domain_text"):
        config.recipe.arm = arm
        made, manifest = rows(config, problems)
        assert {problem.subject for problem, _, _ in made} == {"social science"}
        assert manifest["questions"] == sum(p.subject == "social science" for p in problems.split("train"))
