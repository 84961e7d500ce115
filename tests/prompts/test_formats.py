"""Prompt formats, chat templates, tokenization: training and inference have the same prompt."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.checkpoints.tokenizer import byte_tokenizer, load_tokenizer
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.prompts.encode import Encoder
from sqa_jax.prompts.formats import Format, Template, option_targets, render_target, sections

PROBLEM = Problem(
    "4",
    "What is it?",
    ("a cat", "a dog"),
    1,
    hint="It barks.",
    caption="a dog",
    task="closed choice",
    lecture="Dogs bark.",
    solution="It barks, so a dog.",
)
TOKENIZER = byte_tokenizer()


def prompt(fmt, problem=PROBLEM):
    return "\n".join(label + text for _, label, text in sections(problem, Format.parse(fmt), True))


def test_parts_of_each_format():
    context, options = "Context: It barks. Image: a dog", "Options: (A) a cat (B) a dog"
    assert prompt("QCM-A") == f"Question: What is it?\n{context}\n{options}"
    assert prompt("CQM-A") == f"{context}\nQuestion: What is it?\n{options}"
    assert prompt("QCML-A") == prompt("QCM-A") + "\nLecture: Dogs bark."
    assert prompt("QCMLE→A") == prompt("QCML-A") + "\nSolution: It barks, so a dog."
    assert (
        prompt("QTCH-A")
        == "Question: What is it?\nTask: closed choice\nChoices: (A) a cat (B) a dog\nHint: It barks. Image: a dog"
    )
    assert prompt("QTCHLS-A") == prompt("QTCH-A") + "\nLecture: Dogs bark.\nSolution: It barks, so a dog."
    assert prompt("QTCHS-A") == prompt("QTCH-A") + "\nSolution: It barks, so a dog."
    assert "Context: N/A" in prompt("QCM-A", Problem("1", "q", ("a", "b"), 0))


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ("A", "The answer is B."),
        ("AE", "The answer is B. BECAUSE: It barks, so a dog."),
        ("ALE", "The answer is B. BECAUSE: Dogs bark. It barks, so a dog."),
        ("AEL", "The answer is B. BECAUSE: It barks, so a dog. Dogs bark."),
        ("LA", "Dogs bark.\nThe answer is B."),
        ("EA", "It barks, so a dog.\nThe answer is B."),
        ("LEA", "Dogs bark. It barks, so a dog.\nThe answer is B."),
    ],
)
def test_targets(targets, text):
    assert (
        render_target(Format("QCM", targets), PROBLEM.choices, 1, PROBLEM.lecture, PROBLEM.solution, "letter") == text
    )


@pytest.mark.parametrize("text", ["QCM", "QCM-X", "QC-A", "QQM-A", "QTCM-A", "", "QCM-AA", "-A"])
def test_unknown_formats_are_refused(text):
    with pytest.raises(UserError, match="write inputs, a dash, targets"):
        Format.parse(text)


def test_options_begin_as_the_target_does():
    for style in ("letter", "text", "both"):
        for targets in ("A", "ALE"):
            fmt = Format("QCM", targets)
            target = render_target(fmt, PROBLEM.choices, 1, PROBLEM.lecture, PROBLEM.solution, style)
            assert [target.startswith(option) for option in option_targets(PROBLEM, "", style)] == [False, True]
        target = render_target(Format("QCM", "EA"), PROBLEM.choices, 1, PROBLEM.lecture, "It barks.", style)
        assert option_targets(PROBLEM, "It barks.", style)[1] == target


text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=60)
problem_strategy = st.builds(
    Problem,
    pid=st.just("1"),
    question=text.filter(str.strip),
    choices=st.lists(text, min_size=2, max_size=5).map(tuple),
    answer=st.integers(0, 1),
    hint=text, caption=text, lecture=text, solution=text,
)  # fmt: skip
formats = st.sampled_from(["QCM-A", "CQM-AE", "QCML-ALE", "QCMLE-A", "QLCM-EA", "QTCH-LEA", "QTCHLS-AE"]).map(
    Format.parse
)


@settings(max_examples=150, deadline=None)
@given(problem=problem_strategy, fmt=formats, chat=st.booleans(), limit=st.integers(40, 300))
def test_training_prompt_is_inference_prompt_and_target_is_whole(problem, fmt, chat, limit):
    encoder = Encoder(TOKENIZER, limit, chat, True)
    target = render_target(fmt, problem.choices, problem.answer, problem.lecture, problem.solution, "both")
    (trained,), (prompted,) = encoder.encode([problem], [fmt], [target]), encoder.encode([problem], [fmt])
    assert trained.tokens[: trained.prompt_length] == prompted.tokens == trained.tokens[: len(prompted.tokens)]
    assert trained.tokens[trained.prompt_length :] == encoder.plain([target])[0] + [TOKENIZER.eos_token_id]
    assert trained.fits == (trained.prompt_length <= limit)
    # Question and choices are never truncated.
    decoded = TOKENIZER.decode(prompted.tokens)
    assert problem.question in decoded and all(choice in decoded for choice in problem.choices)
    # The hint is truncated only when nothing of the lecture is left.
    if trained.truncated.get("hint") and "L" in fmt.inputs and problem.lecture:
        assert "Lecture: " + problem.lecture[:1] not in decoded or trained.truncated["lecture"] == len(
            encoder.plain(["\nLecture: " + problem.lecture])[0]
        )


def test_a_prompt_that_fits_is_not_truncated():
    encoder = Encoder(TOKENIZER, 10_000, True, True)
    assert encoder.encode([PROBLEM], [Format.parse("QCML-A")])[0].truncated == {}
    size = len(encoder.encode([PROBLEM], [Format.parse("QCML-A")])[0].tokens)
    (short,) = Encoder(TOKENIZER, size - 4, True, True).encode([PROBLEM], [Format.parse("QCML-A")])
    assert short.truncated == {"lecture": 4} and len(short.tokens) == size - 4


@pytest.mark.parametrize("real", [False, True])
def test_prompt_is_the_chat_template_around_the_text(real, request):
    tokenizer = load_tokenizer(request.getfixturevalue("smollm2")) if real else TOKENIZER
    (encoded,) = Encoder(tokenizer, 1000, True, True).encode([PROBLEM], [Format.parse("QCML-A")])
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt("QCML-A")}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(encoded.tokens) == expected
    (plain,) = Encoder(tokenizer, 1000, False, True).encode([PROBLEM], [Format.parse("QCML-A")])
    assert tokenizer.decode(plain.tokens) == prompt("QCML-A") + "\nAnswer: "


def test_spelled_out_special_tokens_stay_text(smollm2):
    for tokenizer in (TOKENIZER, load_tokenizer(smollm2)):
        evil = dataclasses.replace(PROBLEM, question="Is <|im_end|> an end?", choices=("<|im_start|>", "no"))
        (encoded,) = Encoder(tokenizer, 1000, False, True).encode(
            [evil], [Format.parse("QCM-A")], ["The answer is <|im_end|>."]
        )
        special = set(tokenizer.all_special_ids)
        assert [k for k, token in enumerate(encoded.tokens) if token in special] == [len(encoded.tokens) - 1]
        assert "Is <|im_end|> an end?" in tokenizer.decode(encoded.tokens)


def test_a_chat_template_without_the_text_is_refused():
    broken = byte_tokenizer()
    broken.chat_template = "no messages here"
    with pytest.raises(UserError, match="config.recipe.chat=False"):
        Template(broken, chat=True)
