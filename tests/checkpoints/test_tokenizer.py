"""Tokenizers, held against transformers' own reading of the same file and against llama.cpp's published rule."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from sqa_jax.checkpoints.gguf.tokenizer import gguf_tokenizer
from sqa_jax.checkpoints.tokenizer import byte_tokenizer, fingerprint, load_tokenizer
from sqa_jax.errors import UserError

TEXTS = [
    "",
    " ",
    "Which of these states is farthest north?",
    "The answer is (B) 27\u00b0C, not 3.5 \u00d7 10^8 m/s; it's 1,000,000 times 12 + 34.",
    "  leading and trailing   \n\n\ttabs\r\n and lines  ",
    "def f(x):\n    return x ** 2  # square\n",
    '{"answer": 1, "why": ["a", "b"]}',
    "don't I'll you've he's WE'RE 'tis ''",
    "naïve café, русский, العربية",
    "你好, 한국어",
    "\U0001f600\U0001f469\u200d\U0001f680\U0001f1ef\U0001f1f5 \u2602\ufe0f",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><repo_name>",
    "<|im_start |> <|im_", "\x00\x01\x7f\u2028\ufeff\ufffd",
]  # fmt: skip
DIGITS = ["2  3", "a   12\n  7", "x\u00b2 \u00b2 \u00bd\u2167", "\u0663\u0664 \u0664\u0665", "1 \u0663  \u2460"]
CHATS = [
    [{"role": "user", "content": "Is 12 > 7?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c <|im_end|>"},
    ],
]
# Cs cannot be encoded; Cn is where Unicode versions of the two rules' tables may differ.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=60)
SPECIAL = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "  12", " \u00b2", "\n\n", "'s"])
MIXED = st.lists(st.one_of(ANY_TEXT, SPECIAL), max_size=6).map("".join)


@pytest.fixture(scope="module")
def ours(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2):
    path = Path(smollm2).resolve()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def published(theirs):
    """Theirs with the pre-tokenizer that llama.cpp defines for "smollm": first each \\p{N} alone, then GPT-2's.

    transformers leaves the first step out, so its own reading parts from the model's published tokenizer where a
    digit follows two spaces or a number is not ASCII.
    """
    whole = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return whole


def test_smollm2_equals_transformers(ours, theirs):
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    plain = dict(add_special_tokens=False, split_special_tokens=True)
    ids = ours(TEXTS, **plain)["input_ids"]
    assert ids == theirs(TEXTS, **plain)["input_ids"]
    assert ours.batch_decode(ids) == theirs.batch_decode(ids) == TEXTS
    marked = ours(TEXTS)["input_ids"]
    assert ours.batch_decode(marked, skip_special_tokens=True) == theirs.batch_decode(marked, skip_special_tokens=True)
    for key in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{key}_token_id") == getattr(theirs, f"{key}_token_id"), key
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert (
        ours.backend_tokenizer.get_added_tokens_decoder().keys()
        == theirs.backend_tokenizer.get_added_tokens_decoder().keys()
    )


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chat_template_equals_transformers(ours, theirs, chat, prompt):
    for tokenize in (True, False):
        options = dict(add_generation_prompt=prompt, tokenize=tokenize)
        assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)


def test_smollm2_equals_published_rule(ours, theirs, published):
    for text in TEXTS + DIGITS:
        assert ours(text)["input_ids"] == published.encode(text).ids, text
    # The day transformers follows the rule too, the fixture above has done its work.
    assert any(theirs(text)["input_ids"] != published.encode(text).ids for text in DIGITS)


@settings(max_examples=100, deadline=None)
@given(text=MIXED)
def test_smollm2_equals_published_rule_on_any_text(ours, published, text):
    ids = ours(text)["input_ids"]
    assert ids == published.encode(text).ids
    # SmolLM2 has no token for some bytes (rare control characters); these vanish, in the reference as here.
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = {byte for piece, _ in whole.pre_tokenize_str(text) for byte in piece}
    if spelled <= ours.get_vocab().keys():
        assert ours.decode(ids) == text


def trained(special: list[str], user: list[str]) -> tuple[Tokenizer, dict]:
    """A small byte-level BPE trained here, and the GGUF metadata that llama.cpp would write for it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in user])
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [word for word, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if word in special else 4 if word in user else 1 for word, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 1,
    }
    return tokenizer, metadata


def test_trained_tokenizer_survives_gguf():
    reference, metadata = trained(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<think>"])
    own = gguf_tokenizer(metadata, "here")
    for text in [*TEXTS, *DIGITS, "<think>12<think> x"]:
        assert own(text)["input_ids"] == reference.encode(text).ids, text
    assert own.eos_token == "<|im_end|>"
    assert own.pad_token_id == own.eos_token_id  # the stated choice where a file names none
    ids = own("<|im_end|><think>")["input_ids"]
    assert own.decode(ids, skip_special_tokens=True) == "<think>"


def test_beginning_token_is_told(smollm2):
    _, metadata = trained(["<s>", "</s>"], [])
    assert not gguf_tokenizer(metadata, "here").add_bos_token
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0}
    own = gguf_tokenizer(metadata, "here")
    assert own.add_bos_token and own.bos_token == "<s>"


@settings(max_examples=100, deadline=None)
@given(text=MIXED)
def test_bytes_go_round(text):
    tokenizer = BYTES
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


BYTES = byte_tokenizer()


def test_byte_tokenizer_chats():
    text = BYTES.apply_chat_template(CHATS[1], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert len(BYTES) == 260 and BYTES.eos_token == "<|im_end|>" and BYTES.pad_token_id == 0
    assert BYTES("<|im_end|>")["input_ids"] == [BYTES.eos_token_id]


def test_directory(tmp_path):
    BYTES.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert fingerprint(again) == fingerprint(BYTES) == fingerprint(load_tokenizer(f"random:{tmp_path}"))
    again.chat_template += " "
    assert fingerprint(again) != fingerprint(BYTES)


def change(path: Path, **changes) -> str:
    """Rewrites tokenizer_config.json; None removes a key."""
    raw = {**json.loads(path.joinpath("tokenizer_config.json").read_text()), **changes}
    path.joinpath("tokenizer_config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return str(path)


def refused(path: str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (path, *words)), message


def test_directories_that_are_refused(tmp_path):
    BYTES.save_pretrained(tmp_path / "whole")

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / "copy"))

    assert load_tokenizer(change(fresh(), pad_token=None)).pad_token == "<|im_end|>"
    refused(change(fresh(), eos_token=None), "no end token", "eos_token", "tokenizer_config.json")
    content = (fresh() / "tokenizer.json").read_text()
    for damaged in (content[:-100], "{}", "[]", ""):
        (tmp_path / "copy" / "tokenizer.json").write_text(damaged)
        refused(str(tmp_path / "copy"), "its tokenizer cannot be loaded", "fetch")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    # transformers would make up a tokenizer of three tokens here.
    change(tmp_path / "copy", tokenizer_class="LlamaTokenizer")
    refused(str(tmp_path / "copy"), "holds no tokenizer", "fetch the model's tokenizer files")


WITHOUT_TORCH = """
import importlib.util, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
whole = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] == "torch" else whole(name, package)

from sqa_jax.checkpoints.tokenizer import load_tokenizer
{body}
from transformers.utils import is_torch_available
assert not is_torch_available()
assert not {{"torch", "jax", "flax"}} & set(sys.modules), "a tokenizer needs neither"
"""


def run_without_torch(body: str, *arguments: str):
    """What `body` prints in a process without PyTorch, which must say nothing about its absence."""
    command = [sys.executable, "-c", WITHOUT_TORCH.format(body=body), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    return json.loads(run.stdout)


def test_needs_neither_torch_nor_jax(smollm2, ours):
    body = """
chat = [{"role": "user", "content": "Is 12 > 7?"}]
print(load_tokenizer(sys.argv[1]).apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
"""
    expected = ours.apply_chat_template(CHATS[0], add_generation_prompt=True)["input_ids"]
    assert run_without_torch(body, smollm2) == expected
