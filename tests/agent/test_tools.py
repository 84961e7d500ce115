"""Tools that fail, hang or return too much; retrieval of lectures."""

from __future__ import annotations

import collections
import dataclasses
import math
import time

import bm25s
import pytest

from sqa_jax.agent import retrieval
from sqa_jax.agent.tools import MAX_CHARACTERS, Tool, call_tools, make_tools
from sqa_jax.config import default
from sqa_jax.data.problem import ImageFile, Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.errors import UserError
from sqa_jax.prompts.tool_calls import Call, ToolSpec

LECTURES = [
    "Magnets attract iron and nickel.",
    "A simile compares two things with like or as.",
    "Iron rusts in wet air.",
]
PROBLEMS = [
    Problem(str(k), f"Question {k} on magnets", ("yes", "no"), 0, lecture=lecture) for k, lecture in enumerate(LECTURES)
]
SET = ProblemSet(
    "test", {"train": tuple(PROBLEMS), "test": (Problem("9", "What of magnets?", ("a", "b"), 1, lecture="New."),)}
)


def tool(run, name="look"):
    return Tool(ToolSpec(name, "looks"), run)


def called(run, count=3, timeout=5.0):
    calls = [(problem, Call("look")) for problem in PROBLEMS[:count]]
    return call_tools({"look": tool(run)}, calls, timeout)


def test_each_tool_is_called_once_for_all_its_calls():
    sizes = []

    def run(requests):
        sizes.append(len(requests))
        return [request.problem.pid for request in requests]

    assert [result.text for result in called(run)] == ["0", "1", "2"] and sizes == [3]


def test_a_question_that_breaks_a_tool_spoils_only_its_own():
    def run(requests):
        return [{"0": "zero", "2": "two"}[request.problem.pid] for request in requests]

    results = called(run)
    assert [r.status for r in results] == ["ok", "failed", "ok"] and results[0].text == "zero"
    assert results[1].text.startswith("Error: ")


def test_a_tool_that_hangs_is_given_up():
    def run(requests):
        if any(request.problem.pid == "1" for request in requests):
            time.sleep(60)
        return ["x"] * len(requests)

    started = time.monotonic()
    assert [r.status for r in called(run, timeout=0.2)] == ["ok", "timed out", "ok"]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("said", [["a", "b"], [1, 2, 3], None])
def test_what_is_not_a_text_for_each_call_is_a_failure(said):
    assert {r.status for r in called(lambda requests: said)} == {"failed"}


def test_a_megabyte_is_cut():
    (result, *_) = called(lambda requests: ["x" * 10**6] * len(requests))
    assert len(result.text) == MAX_CHARACTERS and result.status == "ok"


def test_nothing_said_is_empty():
    assert {r.status for r in called(lambda requests: [" "] * len(requests))} == {"empty"}


def test_captions_are_only_of_images():
    (look,) = (make_tools(default(), SET)[name] for name in ("describe_image",))
    seen = dataclasses.replace(PROBLEMS[0], caption="a map", image=ImageFile("x", bytes))
    calls = [(problem, Call("describe_image")) for problem in (seen, dataclasses.replace(seen, image=None))]
    assert [r.text for r in call_tools({"describe_image": look}, calls, 5.0)] == ["a map", ""]


def test_the_oracle_gives_the_own_lecture_and_bm25_that_of_the_training_split():
    config = default()
    own = SET.split("test")[0]
    texts = {}
    for kind in retrieval.KINDS:
        config.agent.retrieval = kind
        (result,) = call_tools(make_tools(config, SET), [(own, Call("retrieve", "wet iron"))], 5.0)
        texts[kind] = result.text
    assert texts == {"oracle": "New.", "bm25": LECTURES[2]}


def test_bm25_ranks_as_the_formula_says():
    """Lucene's variant, the library's default: idf · tf / (tf + k1 (1 − b + b · length / mean length))."""
    index, k1, b = retrieval.Index(PROBLEMS), 1.5, 0.75
    words = [bm25s.tokenize([text], stopwords="en", return_ids=False, show_progress=False)[0] for text in LECTURES]
    mean = sum(map(len, words)) / len(words)

    def score(query, own):
        total = 0.0
        for word in query:
            having = sum(word in other for other in words)
            tf = collections.Counter(own)[word]
            idf = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
            total += idf * tf / (tf + k1 * (1 - b + b * len(own) / mean))
        return total

    for query in ("iron", "attract iron things", "wet magnets compare iron", "nothing of it known"):
        tokens = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        scores = {text: score(tokens, own) for text, own in zip(LECTURES, words, strict=True)}
        expected = [text for text in sorted(LECTURES, key=lambda t: -scores[t]) if scores[text] > 0]
        assert index.search([query], 3)[0] == expected


def test_recall_counts_own_lectures():
    index = retrieval.Index(PROBLEMS)
    asked = [*PROBLEMS, SET.split("test")[0], Problem("10", "No lecture?", ("a", "b"), 0)]
    found = retrieval.recall(index, asked, (1, 3))
    assert found["n"] == 4 and found["in_index"] == 75.0
    # All questions ask about magnets: the first lecture comes first for all.
    assert found["recall@1"] == 25.0 <= found["recall@3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval": "google"}, "config.agent.retrieval is 'google'"),
        ({"tools": ("nothing",)}, "'nothing' is not a tool"),
        ({"tools": ("sqa_jax.agent.caption:nothing",)}, "is not a tool"),
        ({"tools": ("retrieve", "sqa_jax.agent.retrieval:tool")}, "two tools are named 'retrieve'"),
    ],
)
def test_tools_that_cannot_be_made(changes, message):
    config = default()
    config.agent.update(changes)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make_tools(config, SET)


def test_bm25_without_lectures_is_refused():
    with pytest.raises(UserError, match="no lectures"):
        retrieval.Index([dataclasses.replace(PROBLEMS[0], lecture="")])
