"""A tokenizer from the vocabulary of a GGUF file, equal to the one that the model was published with.

transformers reads these, too, but only where PyTorch is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqa_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# GGUF's token types: those of BPE, special tokens, and ordinary added tokens that are matched whole.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# The pre-tokenizer of tiktoken's cl100k_base, with a number's digits in groups of at most {}.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _ByteLevel(NamedTuple):
    """A byte-level BPE as its tokenizer.json describes it.

    Attributes:
      split: the pre-tokenizer's regular expression; None separates digits, then splits as GPT-2 does.
      ignore_merges: a pre-token that is a token of the vocabulary is that token, whatever the merges say.
      normalize_nfc: text is normalised to Unicode's NFC first.
      add_bos: whether texts start with the BOS token where the file does not say.
    """

    split: str | None
    ignore_merges: bool = False
    normalize_nfc: bool = False
    add_bos: bool = False


# By llama.cpp's names of pre-tokenizers.
_BYTE_LEVEL = {
    "smollm": _ByteLevel(None),  # SmolLM 1 and 2
    "llama-bpe": _ByteLevel(_CL100K.format("{1,3}"), ignore_merges=True, add_bos=True),  # Llama 3
    "smaug-bpe": _ByteLevel(_CL100K.format("{1,3}"), ignore_merges=True),  # SmolLM3: Llama 3's, without BOS
    "qwen2": _ByteLevel(_CL100K.format(""), normalize_nfc=True),  # Qwen 2, 2.5 and 3
}
_SENTENCEPIECE = ("gemma", "gemma2", "gemma3")  # architectures
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")


def gguf_tokenizer(metadata: dict[str, Any], where: str) -> Any:
    """Builds the tokenizer that a GGUF file describes, as a `transformers.PreTrainedTokenizerFast`.

    Args:
      metadata: the file's keys and values.
      where: the file, for messages.

    Raises:
      UserError: the file has another kind of tokenizer, a damaged one, or one without an end token.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = _Vocabulary(metadata, where)
    tokenizer, tokens, add_bos = _bpe(vocabulary)
    _add_matched_tokens(tokenizer, tokens, vocabulary.token_types)
    eos = vocabulary.special("eos_token_id", tokens)
    if eos is None:
        raise UserError(
            f"{where}: its tokenizer has no end token (tokenizer.ggml.eos_token_id), so no answer would ever end; "
            "use another file of this model"
        )
    stored_add_bos = vocabulary.get("add_bos_token")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary.special("bos_token_id", tokens),
        eos_token=eos,
        unk_token=vocabulary.special("unknown_token_id", tokens),
        # Padding is marked by its segment, never by its id: any token will do.
        pad_token=vocabulary.special("padding_token_id", tokens) or eos,
        add_bos_token=add_bos if stored_add_bos is None else bool(stored_add_bos),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def turn_end_ids(tokenizer: Any) -> list[int]:
    """The special tokens that end a turn of a chat, recognised by name as in llama.cpp: files often declare none."""
    return [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in _TURN_ENDS]


class _Vocabulary:
    """The `tokenizer.ggml.…` keys of a file."""

    def __init__(self, metadata: dict[str, Any], where: str):
        self.architecture, self.where, self._metadata = metadata.get("general.architecture"), where, metadata
        self.token_types: list[int] = self.entries("token_type", int)

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def entries(self, key: str, kind: type = str) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, list) or not values:
            raise UserError(f"{self.where}: key tokenizer.ggml.{key} is missing; the file is damaged, fetch it again")
        if not all(isinstance(value, kind) for value in values):
            raise UserError(f"{self.where}: key tokenizer.ggml.{key} holds no {kind.__name__}s; fetch it again")
        return values

    def special(self, key: str, tokens: list[str]) -> str | None:
        """The token whose id a key has."""
        index = self.get(key)
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(
                f"{self.where}: tokenizer.ggml.{key} is {index}, beyond its {len(tokens)} tokens; the file is damaged, "
                "fetch it again"
            )
        return None if index is None else tokens[index]


def _bpe(vocabulary: _Vocabulary) -> tuple[Tokenizer, list[str], bool]:
    """The BPE tokenizer without added tokens, its tokens, and whether it adds BOS where the file does not say."""
    kind, pre, architecture = vocabulary.get("model"), vocabulary.get("pre"), vocabulary.architecture
    if kind == "gpt2" and pre in _BYTE_LEVEL:
        tokens = vocabulary.entries("tokens")
        tokenizer = _byte_level(tokens, vocabulary.entries("merges"), _BYTE_LEVEL[pre], vocabulary.where)
        return tokenizer, tokens, _BYTE_LEVEL[pre].add_bos
    if kind == "llama" and architecture in _SENTENCEPIECE:
        # Runs of spaces are stored as spaces, any other space as U+2581.
        tokens = [token.replace(" ", "▁") for token in vocabulary.entries("tokens")]
        return _sentencepiece(tokens, vocabulary.token_types), tokens, True
    raise UserError(
        f"{vocabulary.where}: tokenizer {kind}/{pre} of architecture {architecture} is not supported in GGUF files "
        f"(gpt2/{', gpt2/'.join(_BYTE_LEVEL)} and Gemma's are); use the model's Hugging Face directory"
    )


def _add_matched_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Adds the tokens that are matched whole, before BPE: first special ones, then user-defined ones."""
    from tokenizers import AddedToken

    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        typed = zip(tokens, types, strict=False)
        matched = [
            token for token, token_type in typed if token_type == kind and token.strip("▁")
        ]  # merges make runs of spaces
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in matched])


def _byte_level(tokens: list[str], merges: list[str], kind: _ByteLevel, where: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=kind.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception for a merge of unknown tokens
        raise UserError(
            f"{where}: its merges do not fit its vocabulary ({error}); the file is damaged, fetch it again"
        ) from None
    tokenizer = Tokenizer(model)
    if kind.normalize_nfc:
        tokenizer.normalizer = normalizers.NFC()
    split: Any = pre_tokenizers.Digits(individual_digits=True)
    if kind.split is not None:
        split = pre_tokenizers.Split(Regex(kind.split), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], types: list[int]) -> Tokenizer:
    """Gemma's: spaces are letters (U+2581), and what is not in the vocabulary falls back to bytes.

    SentencePiece merges the two neighbours that form the best token (Kudo & Richardson 2018, arXiv:1808.06226); the
    file has no merges. Gemma's tokens are in the order in which they are to be formed; the scores in the file place
    runs of spaces and of newlines last. Special tokens and those of bytes are never formed from text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    formed = [token for token, kind in zip(tokens, types, strict=False) if kind in (_NORMAL, _USER_DEFINED)]
    merges = [
        (token[:k], token[k:])
        for token in formed
        for k in range(len(token) - 1, 0, -1)
        if token[:k] in vocabulary and token[k:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
