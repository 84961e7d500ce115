"""Tokenizers of each family in GGUF files, compared with transformers' own class, converter or reader of that family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from sqa_jax.checkpoints.gguf.tokenizer import gguf_tokenizer
from sqa_jax.checkpoints.sources import GGUFSource
from sqa_jax.errors import UserError
from tests.checkpoints.test_tokenizer import ANY_TEXT, DIGITS, TEXTS

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # llama.cpp's types of tokens
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
LONE = "Zygote"  # no merges lead to it: Llama's tokenizer matches it whole, Qwen's does not
PIECES = ["<|end|>", "<think>", "<eos>", "<turn>", "<0x0A>", LONE, " " + LONE, "1234", "  12", "\u00b2", "\n\n", "\r\n",
          " \n  ", "'S", "e\u0301", "\u212b", "\u2581", "\u2581\u2581 ", "don't", "the answer", "\n\n\n\n"]  # fmt: skip
MIXED = st.lists(st.one_of(ANY_TEXT, st.sampled_from(PIECES)), max_size=6).map("".join)
FAMILIES = ["llama-bpe", "smaug-bpe", "qwen2", "gemma2", "gemma3"]


def learned(pre_tokenizer: Any, normalizer: Any, alphabet: list[str], size: int) -> list[str]:
    """Tokens of a small BPE, in the order in which they were learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    texts = [*TEXTS, *DIGITS, *map(str, range(0, 2000, 7)), *["the answer is the cat's, don't you think?"] * 9]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def write(path: Path, architecture: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Writes a GGUF file with `tokenizer.ggml.…` keys and no tensors, and returns what is read back."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFSource(path).metadata


def byte_level(pre: str, path: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' tokenizer of Llama 3, SmolLM3 or Qwen over a small vocabulary, and the same as a GGUF file."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ordinary = [*learned(pre_tokenizers.ByteLevel(add_prefix_space=False), None, alphabet, 420), LONE]
    words = [*ordinary, *SPECIAL, "<think>"]
    ids = {word: i for i, word in enumerate(words)}
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    converter = TikTokenConverter()  # what Llama 3's tokenizer.json was made with
    converter.load_tiktoken_bpe = lambda _: {bytes(map(byte_of.get, word)): i for i, word in enumerate(ordinary)}
    _, merges = converter.extract_vocab_merges_from_model("")
    if pre == "qwen2":
        reference = transformers.Qwen2Tokenizer(ids, merges, unk_token=None, eos_token="<|end|>", pad_token="<|end|>")
    else:
        converter.extract_vocab_merges_from_model = lambda _: (ids, merges)
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_object=converter.converted(),
            bos_token="<|begin|>",
            eos_token="<|end|>",
            pad_token="<|end|>",
            add_bos_token=pre == "llama-bpe",
        )
    reference.add_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    reference.add_tokens([AddedToken("<think>", normalized=False)])
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": words,
        "token_type": [NORMAL] * len(ordinary) + [CONTROL] * len(SPECIAL) + [USER],
        "merges": [" ".join(pair) for pair in merges],
        "eos_token_id": ids["<|end|>"],
    }
    if pre != "qwen2":
        keys["bos_token_id"] = ids["<|begin|>"]
    return reference, write(path, "llama", keys)


def gemma_file(architecture: str, path: Path) -> dict[str, Any]:
    """A GGUF file with a small vocabulary in the order of Gemma's; returns its metadata."""
    split = pre_tokenizers.Split("\u2581", "merged_with_next")
    ordinary = learned(split, normalizers.Replace(" ", "\u2581"), ["\u2581"], 320)
    letters = [token for token in ordinary if len(token) == 1]
    runs = [letter * n for letter in "\n " for n in range(2 - (letter == "\n"), 6)]
    typed = [(token, CONTROL) for token in ("<pad>", "<eos>", "<bos>")] + [("<unk>", UNKNOWN)]
    typed += [("<mask>", USER), ("<turn>", CONTROL), ("<unused0>", USER), ("<h1>", USER)]
    typed += [(run, USER) for run in runs]
    typed += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    typed += [(token, NORMAL) for token in ordinary if len(token) > 1]
    typed += [(token, NORMAL) for token in letters if token != "\n"]
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": [token for token, _ in typed],
        "scores": [-1000.0 if kind != NORMAL else -float(i) for i, (_, kind) in enumerate(typed)],
        "token_type": [kind for _, kind in typed],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "padding_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": False,
    }
    return write(path, architecture, keys)


def sentencepiece(architecture: str, path: Path, reference) -> tuple[Any, dict[str, Any]]:
    """transformers' reading of a GGUF file of Gemma, which needs PyTorch: committed as its tokenizer.json."""
    metadata = gemma_file(architecture, path)
    roles = ("bos", "eos", "pad", "unk")

    def compute() -> dict[str, np.ndarray]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        special = [getattr(tokenizer, f"{role}_token") for role in roles]
        return {"json": np.asarray(tokenizer.backend_tokenizer.to_str()), "special": np.asarray(special)}

    arrays = reference(f"checkpoints/gguf/tokenizer-{architecture}", compute)
    special = {f"{role}_token": token for role, token in zip(roles, arrays["special"].tolist(), strict=True)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(str(arrays["json"])), **special, clean_up_tokenization_spaces=False
    ), metadata


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory, reference):
    """(transformers' tokenizer, ours) of one family."""
    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    if request.param.startswith("gemma"):
        theirs, metadata = sentencepiece(request.param, path, reference)
    else:
        theirs, metadata = byte_level(request.param, path)
    return theirs, gguf_tokenizer(metadata, "here")


def check(both, text: str) -> None:
    reference, ours = both
    for options in ({}, dict(add_special_tokens=False, split_special_tokens=True)):
        ids = ours(text, **options)["input_ids"]
        assert ids == reference(text, **options)["input_ids"], (text, options)
        decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for tokenizer in both]
        assert decoded[0] == decoded[1], text


def test_equals_transformers(both):
    reference, ours = both
    for text in [*TEXTS, *DIGITS, *PIECES, " ".join(PIECES)]:
        check(both, text)
    for key in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{key}_token_id") == getattr(reference, f"{key}_token_id"), key
    assert len(ours) == len(reference) and ours.get_vocab().keys() >= {*reference.all_special_tokens}


@settings(max_examples=40, deadline=None)
@given(text=MIXED)
@example("the  answer\n\n\n is   12345 \u00b2\n")
def test_equals_transformers_on_any_text(both, text):
    check(both, text)


def test_spelled_out_special_tokens_stay_text(both):
    _, ours = both
    for word in ours.all_special_tokens + SPECIAL + ["<turn>", "<0x0A>"]:
        ids = ours(word, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert len(ids) > 1 and ours.decode(ids) == word


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("smaug-bpe", True), ("qwen2", False)])
def test_words_that_no_merges_lead_to(tmp_path, pre, whole):
    _, metadata = byte_level(pre, tmp_path / "m.gguf")
    assert (len(gguf_tokenizer(metadata, "here").tokenize(LONE)) == 1) is whole


@pytest.mark.parametrize(("family", "adds_bos"), [("llama-bpe", True), ("smaug-bpe", False), ("gemma3", True)])
def test_bos_where_the_file_does_not_say(tmp_path, family, adds_bos):
    path = tmp_path / "m.gguf"
    metadata = gemma_file(family, path) if family == "gemma3" else byte_level(family, path)[1]
    metadata.pop("tokenizer.ggml.add_bos_token", None)
    ours = gguf_tokenizer(metadata, "here")
    assert ours.add_bos_token is adds_bos
    assert (ours("a")["input_ids"][0] == ours.bos_token_id) is adds_bos
    metadata["tokenizer.ggml.add_bos_token"] = not adds_bos
    assert gguf_tokenizer(metadata, "here").add_bos_token is not adds_bos


def test_kinds_that_are_refused(tmp_path):
    _, metadata = byte_level("qwen2", tmp_path / "m.gguf")
    for key, value, named in (
        ("tokenizer.ggml.pre", "tekken", "gpt2/tekken"),
        ("tokenizer.ggml.model", "llama", "llama/qwen2 of architecture llama"),
        ("tokenizer.ggml.model", "t5", "t5/qwen2"),
    ):
        with pytest.raises(UserError) as caught:
            gguf_tokenizer(metadata | {key: value}, "here")
        known = ("here", named, "gpt2/smollm", "gpt2/llama-bpe", "gpt2/smaug-bpe", "gpt2/qwen2", "Gemma", "directory")
        assert all(word in str(caught.value) for word in known), caught.value
