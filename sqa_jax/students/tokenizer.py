"""Tokenizers: from a Hugging Face directory, from a GGUF file's own vocabulary, or of bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sqa_jax.errors import UserError

# transformers advises at import that no PyTorch was found; here that is intended.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Each turn between markers; the text of a reply follows the last line.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CONTROL = 3  # token type of special tokens in GGUF files


def load_tokenizer(path: str, revision: str = "") -> Any:
    """The tokenizer of a student, as a `transformers.PreTrainedTokenizerFast`.

    Args:
      path: as `config.student.path`: a .gguf file, "random:…", a directory or a hub id.

    Raises:
      UserError: there is none, or it has no end token.
    """
    if path.startswith("random:"):
        rest = path.removeprefix("random:")
        return load_tokenizer(rest) if (Path(rest) / "tokenizer.json").exists() else byte_tokenizer()
    if path.endswith(".gguf"):
        from sqa_jax.students.sources import GGUFSource

        return gguf_tokenizer(GGUFSource(path).metadata, path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or None)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded ({str(error).splitlines()[0]}); fetch the model's tokenizer files") from None
    return _checked(tokenizer, path)


def _checked(tokenizer: Any, where: str) -> Any:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end token; set eos_token in tokenizer_config.json, or no answer would ever end")
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any id will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def gguf_tokenizer(metadata: dict[str, Any], where: str) -> Any:
    """Builds the byte-level BPE tokenizer that a GGUF file describes.

    Raises:
      UserError: the file has another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind = (get("model"), get("pre"))
    if kind != ("gpt2", "smollm"):
        raise UserError(f"{where}: tokenizer {kind[0]}/{kind[1]} is not supported in GGUF files (gpt2/smollm is); use the model's Hugging Face directory")
    words, types = get("tokens"), get("token_type")
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])

    def word(key: str) -> str | None:
        index = get(key)
        return None if index is None else words[index]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=word("bos_token_id"),
        eos_token=word("eos_token_id"),
        unk_token=word("unknown_token_id"),
        pad_token=word("padding_token_id"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return _checked(fast, where)


def byte_tokenizer() -> Any:
    """Bytes and four special tokens, 260 in all: for students made at random."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def fingerprint(tokenizer: Any) -> str:
    """Hex digest of all that decides which ids a text becomes."""
    text = tokenizer.backend_tokenizer.to_str() + repr((tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id))
    return hashlib.sha256(text.encode()).hexdigest()
