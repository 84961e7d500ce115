"""Parsing of the chosen option, in replies as teachers and students really write them."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sqa_jax.data.answers import parse_answer
from sqa_jax.prompts.formats import ANSWER_STYLES, Format, render_target

WORDS = ("mustard", "minute", "movies")

CASES = [
    ("B", WORDS, "letters", 1),
    ("(C)", WORDS, "letters", 2),
    ("b) minute", WORDS, "letters", 1),
    ("The answer is B.", WORDS, "letters", 1),
    ("The answer is (B) minute. BECAUSE: mustard comes first.", WORDS, "letters", 1),
    ("Answer: C", WORDS, "letters", 2),
    ("**Answer:** minute", WORDS, "letters", 1),
    ("The answer is **(1) minute**. \n\nHere's why:\n* (0) is wrong", WORDS, "zero", 1),
    ("(1) minute", WORDS, "zero", 1),
    ("1 (minute)", WORDS, "zero", 1),
    ("2. movies", WORDS, "zero", 2),
    ("2. minute", WORDS, "one", 1),
    ('```json\n{\n "answer": 1,\n "solution": "x"}\n```', WORDS, "zero", 1),
    ('```json\n{\n "answer": "1",\n "solu', WORDS, "zero", 1),
    ('{"answer": "minute", "solution": ""}', WORDS, "zero", 1),
    ('{"answer": "(2) movies"}', WORDS, "zero", 2),
    ('{"answer": "B"}', WORDS, "letters", 1),
    ('{"answer": [1]}', WORDS, "zero", 1),
    ('{"answer": 7}', WORDS, "zero", None),
    ("The word between them is **(0) mustard**.\n\n(1) is not.", WORDS, "zero", 0),
    ("The better word is:\n\n(C): movies, since (A) is not.", WORDS, "letters", 2),
    ("(1) is more formal. Option (0) uses slang.", WORDS, "zero", 1),
    ("It is tempting, but the answer is not (A). The answer is (C).", WORDS, "letters", 2),
    ("First I thought the answer is A. But no: the answer is B.", WORDS, "letters", 1),
    ("Mustard is too early and movies is the last.", WORDS, "letters", None),
    ("I would go with minute.", WORDS, "letters", 1),
    ("", WORDS, "letters", None),
    ("I cannot see the image.", WORDS, "letters", None),
    ("The correct answer is not provided.", WORDS, "zero", None),
    # An option that is part of another: the longest counts.
    ("The answer is sea turtle.", ("turtle", "sea turtle"), "letters", 1),
    ("The answer is turtle.", ("turtle", "sea turtle"), "letters", 0),
    # Options that are numbers: a bare number is the text, a bracketed one the mark.
    ("The answer is 2.", ("1", "2", "3"), "zero", 1),
    ("The answer is (2).", ("1", "2", "3"), "zero", 2),
    ("The answer is 35°C.", ("35°C", "5°C"), "letters", 0),
    # A mark and a text that disagree: the text was meant.
    ("The answer is (0) minute", WORDS, "zero", 1),
    # A letter that begins a sentence is no mark.
    ("A dog barks.", ("dog", "cat"), "letters", 0),
]


@pytest.mark.parametrize(("text", "choices", "numbering", "expected"), CASES)
def test_replies(text, choices, numbering, expected):
    assert parse_answer(text, choices, numbering=numbering) == expected


options = st.lists(
    st.text(string.ascii_lowercase + " ", min_size=3, max_size=14).map(str.strip).filter(lambda s: len(s) > 2),
    min_size=2,
    max_size=5,
    unique=True,
)


@settings(max_examples=150, deadline=None)
@given(
    choices=options, data=st.data(), style=st.sampled_from(ANSWER_STYLES), targets=st.sampled_from(["A", "AE", "EA"])
)
def test_targets_are_parsed_as_their_answer(choices, data, style, targets):
    """Of every format and style."""
    index = data.draw(st.integers(0, len(choices) - 1))
    assume(not any(word in choices for word in ("not", "neither")))
    text = render_target(Format("QCM", targets), tuple(choices), index, "", "some solid reason", style)
    assert parse_answer(text, choices) == index


@settings(max_examples=100, deadline=None)
@given(
    choices=options,
    data=st.data(),
    form=st.sampled_from(["({i})", "The answer is **({i}) {t}**.", "{t}", '{{"answer": {i}}}', "({i}) {t}\n\nsince"]),
)
def test_numbered_replies_are_parsed(choices, data, form):
    index = data.draw(st.integers(0, len(choices) - 1))
    assert parse_answer(form.format(i=index, t=choices[index]), choices, numbering="zero") == index


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200), choices=options)
def test_any_text_gives_an_option_or_none(text, choices):
    answer = parse_answer(text, choices)
    assert answer is None or 0 <= answer < len(choices)
