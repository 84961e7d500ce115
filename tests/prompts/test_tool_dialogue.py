"""Dialogues with tools, tokenized: three forms, each parsed as it was written."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.data.problem import Problem
from sqa_jax.prompts.tool_calls import Call, ToolSpec
from sqa_jax.prompts.tool_dialogue import NOTHING, Dialogue

QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
TOOLS = [ToolSpec("describe_image", "says what the image shows"), ToolSpec("retrieve", "finds a lecture", QUERY)]
PROBLEM = Problem(
    "1", "Which is cold?", ("ice", "fire"), 0, hint="Think.", caption="an ice cube", lecture="Ice is cold."
)
# A template with a form for tools, after Qwen2.5's.
NATIVE = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n"
    "</tool_response><|im_end|>\n{% elif message.tool_calls %}<|im_start|>assistant\n{% for call in message.tool_calls %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def dialogue(form):
    tokenizer, recipe = byte_tokenizer(), default().recipe
    recipe.chat, recipe.answer, recipe.max_prompt = form != "plain", "text", 600
    if form == "native":
        tokenizer.chat_template = NATIVE
    tool_dialogue = Dialogue(tokenizer, recipe, TOOLS)
    assert tool_dialogue.form == form
    return tool_dialogue, tokenizer


FORMS = ["plain", "chat", "native"]


@pytest.mark.parametrize("form", FORMS)
def test_text_of_a_whole_dialogue(form):
    tool_dialogue, tokenizer = dialogue(form)
    (opening,) = tool_dialogue.encode_questions([PROBLEM])
    result, left_out = tool_dialogue.encode_result("Ice is cold.", 500)
    whole = tokenizer.decode(
        [
            *opening.tokens,
            *tool_dialogue.encode_call(Call("retrieve", "cold things")),
            *result,
            *tool_dialogue.encode_answers(PROBLEM)[0],
        ]
    )
    assert left_out == 0 and "an ice cube" not in whole and whole.count("Ice is cold.") == 1
    question = "Question: Which is cold?\nContext: Think.\nOptions: (A) ice (B) fire"
    tail = {
        "plain": question + "\nAction: retrieve(cold things)\nResult: Ice is cold.\nAnswer: The answer is ice.",
        "chat": question + "<|im_end|>\n<|im_start|>assistant\nretrieve(cold things)<|im_end|>\n<|im_start|>tool\nIce is cold."
        "<|im_end|>\n<|im_start|>assistant\nThe answer is ice.",
        "native": question + "<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "retrieve", "arguments": {"query": "cold things"}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\nIce is cold.\n</tool_response><|im_end|>\n<|im_start|>assistant\nThe answer is ice.",
    }[form]  # fmt: skip
    assert whole.endswith(tail)
    assert all(tool.description in whole for tool in TOOLS)


def test_native_form_equals_the_chat_template():
    tool_dialogue, tokenizer = dialogue("native")
    (opening,) = tool_dialogue.encode_questions([PROBLEM])
    ours = [
        *opening.tokens,
        *tool_dialogue.encode_call(Call("retrieve", 'a "b"')),
        *tool_dialogue.encode_result("x", 100)[0],
    ]
    user = "Question: Which is cold?\nContext: Think.\nOptions: (A) ice (B) fire"
    call = {"type": "function", "function": {"name": "retrieve", "arguments": {"query": 'a "b"'}}}
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "retrieve", "content": "x"},
    ]
    schemas = [tool.schema() for tool in TOOLS]
    theirs = tokenizer.apply_chat_template(messages, tools=schemas, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ours) == theirs


@pytest.mark.parametrize("form", FORMS)
@given(
    argument=st.text(st.characters(codec="ascii", exclude_characters="()\"'\\", exclude_categories=["Cc"]), min_size=1)
)
@settings(max_examples=30, deadline=None)
def test_a_written_call_is_parsed(form, argument):
    tool_dialogue, tokenizer = dialogue(form)
    call = Call("retrieve", argument.strip())
    reply = tool_dialogue.parse(tokenizer.decode(tool_dialogue.encode_call(call)) + " and so on", PROBLEM)
    assert reply.call == call and not reply.error


@pytest.mark.parametrize(
    ("text", "call", "answer", "error"),
    [
        ("describe_image()", Call("describe_image"), None, ""),
        ("Action: describe_image(the cat)", Call("describe_image"), None, ""),
        ("Let me see. retrieve(query='cold things')", Call("retrieve", "cold things"), None, ""),
        ('{"name": "retrieve", "parameters": {"query": "a \\"b\\" (c)"}}', Call("retrieve", 'a "b" (c)'), None, ""),
        ("describe_image() The answer is fire.", Call("describe_image"), None, ""),  # the call comes first
        ("The answer is fire. describe_image()", None, 1, ""),
        ("Answer: The answer is ice.", None, 0, ""),
        ("search(cold)", None, None, "there is no tool search"),
        ("I do not know", None, None, "this is neither a call nor an answer"),
        ("", None, None, "this is neither a call nor an answer"),
    ],
)
def test_the_first_call_or_answer_of_a_text_counts(text, call, answer, error):
    reply = dialogue("plain")[0].parse(text, PROBLEM)
    assert (reply.call, reply.answer, reply.error) == (call, answer, error)
    assert text.startswith(reply.text)


def test_results_are_truncated_and_counted():
    tool_dialogue, tokenizer = dialogue("chat")
    shown, left_out = tool_dialogue.encode_result("x" * 100, 40 + tool_dialogue.result_overhead)
    assert len(shown) == 40 + tool_dialogue.result_overhead and left_out == 60
    assert NOTHING in tokenizer.decode(tool_dialogue.encode_result("", 100)[0])
    assert tool_dialogue.encode_result("abc", 0)[1] == 3


def test_special_tokens_in_a_result_are_text():
    tool_dialogue, tokenizer = dialogue("chat")
    shown, _ = tool_dialogue.encode_result("<|im_end|>", 100)
    assert shown.count(tokenizer.eos_token_id) == tool_dialogue.encode_result("", 100)[0].count(tokenizer.eos_token_id)


def test_a_long_hint_is_truncated_as_in_prompts_without_tools():
    tool_dialogue, _ = dialogue("plain")
    (long,) = tool_dialogue.encode_questions([dataclasses.replace(PROBLEM, hint="word " * 300)])
    assert len(long.tokens) == 600 and long.truncated["hint"] > 0 and long.fits
