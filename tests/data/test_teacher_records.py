"""Teacher replies: complete, empty, damaged, with options numbered in several ways."""

from __future__ import annotations

import json

import pytest

from sqa_jax.data.problem import Problem
from sqa_jax.data.reasoning import chain_of_thought
from sqa_jax.data.teacher_records import make_records, parse_reply

PROBLEM = Problem("7", "Which word?", ("mustard", "minute", "movies"), 1)


@pytest.mark.parametrize(
    ("raw", "answer", "reasoning", "solution", "status"),
    [
        ('```json\n{"answer": 1, "solution": "It is \\"between\\"."}\n```', 1, "", 'It is "between".', "ok"),
        ('{"answer": "2", "explanation": "last\\nword"}', 2, "", "last\nword", "ok"),
        ('```json\n{"answer": 1,\n "solution": "It is betw', 1, "", "It is betw", "ok"),
        ('```json\n{"answer": 1,\n "sol', 1, "", "", "malformed"),
        ('{"answer": "nutria", "solution": "x"}', None, "", "x", "unparsed"),
        ("The answer is **(1) minute**. Since m-i.", 1, "Since m-i.", "", "ok"),
        ("I cannot see it.", None, "I cannot see it.", "", "unparsed"),
        ("  \n", None, "", "", "empty"),
    ],
)
def test_replies(raw, answer, reasoning, solution, status):
    assert parse_reply(raw, PROBLEM, "zero") == (answer, reasoning, solution, status)


def reply(raw, model="m"):
    return {"pid": "7", "model": model, "setting": "QTCH", "raw": raw}


def test_numbering_is_inferred_from_quoted_options():
    """A bare "(1)" is the option that the model's other replies in the same setting number so."""
    for mark, index in (("1", 1), ("2", 1), ("B", 1)):
        rows = [reply(f"({mark}) minute")] * 3 + [reply(f"The answer is ({mark}).")]
        assert [r.answer for r in make_records(rows, {"7": PROBLEM})] == [index] * 4


def test_unknown_questions_are_left_out_and_service_status_kept():
    rows = [reply("(1) minute"), {**reply("(1)"), "pid": "8"}, {**reply("", "x"), "status": "blocked", "price": 0.5}]
    records = make_records(rows, {"7": PROBLEM})
    assert [(r.pid, r.status, r.price) for r in records] == [("7", "ok", None), ("7", "blocked", 0.5)]


def test_kinds_of_a_record():
    texts = ['{"answer": 1, "solution": "s"}', "Since m-i, the answer is (1) minute", "(1) minute", ""]
    kinds = [r.kinds for r in make_records(map(reply, texts), {"7": PROBLEM})]
    assert kinds == [("solution",), ("reasoning",), (), ()]
    json.dumps([r.__dict__ for r in make_records(map(reply, texts), {"7": PROBLEM})])


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("The answer is **(1) metaphor**. Here's why:\n\n* **Metaphor:** compares.\n* No like.", "Metaphor: compares. No like."),
        ("The answer is (2). Kansas is the farthest east.", "Kansas is the farthest east."),
        ("(1) attract\n\nUnlike poles attract.", "Unlike poles attract."),
        ("It comes after m. So the answer is **(0) no**.", "It comes after m."),
        ("Let's see. (0) dogs bark, (1) cats do not.\n\nLet me know if you have questions!", "Let's see. dogs bark, cats do not."),
        ("The answer is (1).", ""),
        ("Circular reasoning: it is *Macropus*. 1.5 km is far.", "Circular reasoning: it is Macropus. 1.5 km is far."),
    ],
)  # fmt: skip
def test_a_chain_of_thought_is_the_argument_alone(text, argument):
    assert chain_of_thought(text) == argument
