"""DecodeSlots as ids: three forms, each read back as it was written."""

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
    made = Dialogue(tokenizer, recipe, TOOLS)
    assert made.form == form
    return made, tokenizer


FORMS = ["plain", "chat", "native"]


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_conversation_reads_as_a_person_would_write_it(form):
    made, tokenizer = dialogue(form)
    (opening,) = made.encode_questions([PROBLEM])
    result, left_out = made.encode_result("Ice is cold.", 500)
    whole = tokenizer.decode(
        [*opening.tokens, *made.encode_call(Call("retrieve", "cold things")), *result, *made.encode_answers(PROBLEM)[0]]
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


def test_the_native_form_is_what_the_template_itself_renders():
    made, tokenizer = dialogue("native")
    (opening,) = made.encode_questions([PROBLEM])
    ours = [*opening.tokens, *made.encode_call(Call("retrieve", 'a "b"')), *made.encode_result("x", 100)[0]]
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
def test_a_call_is_read_as_it_was_written(form, argument):
    made, tokenizer = dialogue(form)
    call = Call("retrieve", argument.strip())
    said = made.parse(tokenizer.decode(made.encode_call(call)) + " and so on", PROBLEM)
    assert said.call == call and not said.error


@pytest.mark.parametrize(
    ("text", "call", "answer", "error"),
    [
        ("describe_image()", Call("describe_image"), None, ""),
        ("Action: describe_image(the cat)", Call("describe_image"), None, ""),
        ("Let me see. retrieve(query='cold things')", Call("retrieve", "cold things"), None, ""),
        ('{"name": "retrieve", "parameters": {"query": "a \\"b\\" (c)"}}', Call("retrieve", 'a "b" (c)'), None, ""),
        ("describe_image() The answer is fire.", Call("describe_image"), None, ""),  # it answers before it has looked
        ("The answer is fire. describe_image()", None, 1, ""),
        ("Answer: The answer is ice.", None, 0, ""),
        ("search(cold)", None, None, "there is no tool search"),
        ("I do not know", None, None, "this is neither a call nor an answer"),
        ("", None, None, "this is neither a call nor an answer"),
    ],
)
def test_texts_are_read_for_what_they_say_first(text, call, answer, error):
    said = dialogue("plain")[0].parse(text, PROBLEM)
    assert (said.call, said.answer, said.error) == (call, answer, error)
    assert text.startswith(said.text)


def test_results_are_shortened_to_the_room_and_counted():
    made, tokenizer = dialogue("chat")
    shown, left_out = made.encode_result("x" * 100, 40 + made.result_overhead)
    assert len(shown) == 40 + made.result_overhead and left_out == 60
    assert NOTHING in tokenizer.decode(made.encode_result("", 100)[0])
    assert made.encode_result("abc", 0)[1] == 3


def test_special_tokens_in_a_result_are_text():
    made, tokenizer = dialogue("chat")
    shown, _ = made.encode_result("<|im_end|>", 100)
    assert shown.count(tokenizer.eos_token_id) == made.encode_result("", 100)[0].count(tokenizer.eos_token_id)


def test_a_long_hint_is_shortened_as_in_prompts_without_tools():
    made, _ = dialogue("plain")
    (long,) = made.encode_questions([dataclasses.replace(PROBLEM, hint="word " * 300)])
    assert len(long.tokens) == 600 and long.truncated["hint"] > 0 and long.fits
