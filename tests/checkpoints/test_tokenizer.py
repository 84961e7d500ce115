"""Tokenizers, compared with transformers' own of the same file and with llama.cpp's published rule."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
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


PLAIN = dict(add_special_tokens=False, split_special_tokens=True)
ADDED = ("bos", "eos", "pad", "unk")


def flat(batch: list[list[int]]) -> np.ndarray:
    """Lists of ids as one array, with -1 after each."""
    return np.asarray([token for ids in batch for token in (*ids, -1)], np.int32)


def digest(value: Any) -> np.ndarray:
    """SHA-256 of a value's JSON, as an array."""
    return np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint8)


def chats_of(tokenizer) -> dict[str, np.ndarray]:
    """Of each chat and way to ask for a reply, the text and the ids."""
    arrays = {}
    for number, chat in enumerate(CHATS):
        for prompt in (True, False):
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
            arrays |= {f"text-{number}-{prompt}": np.asarray(text), f"ids-{number}-{prompt}": flat([ids])}
    return arrays


def tokenization_of(tokenizer) -> dict[str, np.ndarray]:
    """Ids and texts of `TEXTS` in several ways, and the whole vocabulary as hashes."""
    marked, plain = tokenizer(TEXTS)["input_ids"], tokenizer(TEXTS, **PLAIN)["input_ids"]
    assert tokenizer.batch_decode(plain) == TEXTS
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {
        "marked": flat(marked),
        "plain": flat(plain),
        "digits": flat(tokenizer(DIGITS)["input_ids"]),
        "without_special": digest(tokenizer.batch_decode(marked, skip_special_tokens=True)),
        "special": np.asarray([getattr(tokenizer, f"{key}_token_id") for key in ADDED]),
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "merges": digest(merges),
        "added": np.asarray(sorted(tokenizer.backend_tokenizer.get_added_tokens_decoder())),
    }


@pytest.fixture(scope="module")
def theirs(reference, smollm2) -> dict[str, np.ndarray]:
    """transformers' own tokenizer of the same file."""

    def compute() -> dict[str, np.ndarray]:
        path = Path(smollm2).resolve()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return tokenization_of(tokenizer) | chats_of(tokenizer)

    return reference("checkpoints/smollm2-tokenizer", compute)


@pytest.fixture(scope="module")
def published(ours):
    """The vocabulary and merges with the pre-tokenizer that llama.cpp defines for "smollm": each \\p{N} alone, then GPT-2's.

    transformers leaves the first step out, so its tokenizer differs from the model's published one where a digit
    follows two spaces or a number is not ASCII.
    """
    tokenizer = Tokenizer.from_str(ours.backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_smollm2_equals_transformers(ours, theirs):
    """In all but the ids of digits, where transformers differs from the published rule."""
    for key, values in tokenization_of(ours).items():
        assert np.array_equal(values, theirs[key]) == (key != "digits"), key


def test_smollm2_chat_template_equals_transformers(ours, theirs):
    for key, values in chats_of(ours).items():
        np.testing.assert_array_equal(values, theirs[key], err_msg=key)


def test_smollm2_equals_published_rule(ours, published):
    for text in TEXTS + DIGITS:
        assert ours(text)["input_ids"] == published.encode(text).ids, text


@settings(max_examples=60, deadline=None)
@given(text=MIXED)
def test_smollm2_equals_published_rule_on_any_text(ours, published, text):
    ids = ours(text)["input_ids"]
    assert ids == published.encode(text).ids
    # SmolLM2 has no token for some bytes (rare control characters); both tokenizers drop them.
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text_bytes = {byte for piece, _ in to_bytes.pre_tokenize_str(text) for byte in piece}
    if text_bytes <= ours.get_vocab().keys():
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
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in special else 4 if token in user else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 1,
    }
    return tokenizer, metadata


def test_trained_tokenizer_survives_gguf():
    reference, metadata = trained(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<think>"])
    ours = gguf_tokenizer(metadata, "here")
    for text in [*TEXTS, *DIGITS, "<think>12<think> x"]:
        assert ours(text)["input_ids"] == reference.encode(text).ids, text
    assert ours.eos_token == "<|im_end|>"
    assert ours.pad_token_id == ours.eos_token_id  # the stated choice where a file has none
    ids = ours("<|im_end|><think>")["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == "<think>"


def test_bos_token_is_read():
    _, metadata = trained(["<s>", "</s>"], [])
    assert not gguf_tokenizer(metadata, "here").add_bos_token
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0}
    ours = gguf_tokenizer(metadata, "here")
    assert ours.add_bos_token and ours.bos_token == "<s>"


@settings(max_examples=60, deadline=None)
@given(text=MIXED)
def test_bytes_round_trip(text):
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


def refused(path: str, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in (path, *parts)), message


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
    # transformers would build a tokenizer of three tokens here.
    change(tmp_path / "copy", tokenizer_class="LlamaTokenizer")
    refused(str(tmp_path / "copy"), "holds no tokenizer", "fetch the model's tokenizer files")


TOKENIZE = """
import json, sys
sys.modules["torch"] = None  # an import of it fails
from sqa_jax.checkpoints.tokenizer import load_tokenizer
chat = [{"role": "user", "content": "Is 12 > 7?"}]
print(json.dumps(load_tokenizer(sys.argv[1]).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]))
assert not {"jax", "flax"} & set(sys.modules)
"""


def test_needs_neither_torch_nor_jax(smollm2, ours):
    """In its own process, which must print no warning about that."""
    expected = ours.apply_chat_template(CHATS[0], add_generation_prompt=True)["input_ids"]
    run = subprocess.run([sys.executable, "-c", TOKENIZE, smollm2], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stderr == "" and json.loads(run.stdout) == expected, run.stderr
