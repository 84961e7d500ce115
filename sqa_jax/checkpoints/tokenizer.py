"""Tokenizers: from a Hugging Face directory, from a GGUF file's vocabulary, or of bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sqa_jax.checkpoints.gguf.tokenizer import gguf_tokenizer
from sqa_jax.checkpoints.paths import locate
from sqa_jax.checkpoints.safetensors_source import read_hf_config
from sqa_jax.checkpoints.sources import GGUFSource
from sqa_jax.errors import UserError
from sqa_jax.models.catalogue import SHAPES
from sqa_jax.models.t5.config import decoder_start
from sqa_jax.models.vision.registry import VisionConfig, vision_family

# transformers advises at import that no PyTorch was found; here that is intended.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# ChatML; the text of a reply follows the last line. In a turn of several parts an image becomes a placeholder.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else "
    "'PLACEHOLDER' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str, revision: str = "") -> Any:
    """The tokenizer of a student, as a `transformers.PreTrainedTokenizerFast`.

    For an encoder–decoder it has an attribute `decoder_start_token`, the token that the decoder starts from.

    Args:
      path: as `config.student.path`: a .gguf file, "random:…", a directory or a hub id.
      revision: branch, tag or commit of a hub id.

    Raises:
      UserError: there is none, it is damaged or not supported, or it has no end token.
    """
    if path.startswith("random:"):
        rest = path.removeprefix("random:")
        if (Path(rest) / "tokenizer.json").exists():
            return load_tokenizer(rest)
        if rest in SHAPES:
            shape = SHAPES[rest]
            return _with_start(byte_tokenizer(shape.vision), getattr(shape, "decoder_start", None), path)
        return _with_start(byte_tokenizer(), _start_in(rest), path)
    where = locate(path, revision, weights=False)
    if not where.is_dir():
        return gguf_tokenizer(GGUFSource(where).metadata, path)
    # Without a vocabulary transformers would make up a tokenizer of three tokens.
    if not any((where / file).exists() for file in _VOCABULARIES):
        raise UserError(f"{path}: holds no tokenizer ({', '.join(_VOCABULARIES)}); fetch the model's tokenizer files")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # whatever its parsers raise, down to bare Exception
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path}: its tokenizer cannot be loaded ({reason}); fetch the model's tokenizer files again"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{path}: its tokenizer has no tokenizer.json form; save it with transformers as a fast tokenizer"
        )
    return _checked(_with_start(tokenizer, _start_in(where), path), path)


def _start_in(directory: str | Path) -> int | None:
    """The decoder's start token according to a directory's `config.json`; None without one, or if it is not a T5's."""
    if not (Path(directory) / "config.json").exists():
        return None
    raw = read_hf_config(directory)
    return decoder_start(raw) if raw.get("model_type") == "t5" else None


def _with_start(tokenizer: Any, start: int | None, where: str) -> Any:
    if start is not None:
        tokenizer.decoder_start_token = tokenizer.convert_ids_to_tokens(start)
        if tokenizer.decoder_start_token not in tokenizer.all_special_tokens:
            raise UserError(
                f"{where}: token {start} ({tokenizer.decoder_start_token!r}), which the decoder starts from, is not a "
                "special token of its tokenizer; use the tokenizer that the model was published with"
            )
        tokenizer.chat_template = None  # the prompt is the encoder's input, the reply the decoder's
    return tokenizer


def _checked(tokenizer: Any, where: str) -> Any:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{where}: its tokenizer has no end token, so no answer would ever end; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # Padding is marked by its segment, never by its id, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer(vision: VisionConfig | None = None) -> Any:
    """A tokenizer of bytes and four special tokens, 260 in all: for students with random weights.

    Args:
      vision: of a vision-language model; its family's special tokens for images then follow the 260.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    image_tokens = () if vision is None else vision_family(vision).SPECIAL_TOKENS
    added = [AddedToken(token, special=True, normalized=False) for token in (*special, *image_tokens)]
    tokenizer.add_special_tokens(added)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE.replace("PLACEHOLDER", "" if vision is None else vision.placeholder)
    return fast


def fingerprint(tokenizer: Any) -> str:
    """Hex digest of everything that determines which ids a text becomes."""
    rest = (tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if hasattr(tokenizer, "decoder_start_token"):
        rest += (tokenizer.decoder_start_token,)
    text = tokenizer.backend_tokenizer.to_str() + repr(rest)
    return hashlib.sha256(text.encode()).hexdigest()
