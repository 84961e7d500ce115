"""A tokenizer from the vocabulary of a GGUF file, equal to the one that the model was published with.

transformers reads these too, but only where PyTorch is installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqa_jax.errors import UserError

# GGUF's types of tokens: what BPE makes, special ones, and ordinary ones that are matched whole.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# How text falls into pieces in tiktoken's cl100k_base, with a number's digits in groups of at most {}.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _ByteLevel(NamedTuple):
    """A byte-level BPE as its tokenizer.json describes it.

    Attributes:
      split: the pieces of a text, as a regular expression; None parts digits, then splits as GPT-2 does.
      whole_words: a piece that is a word of the vocabulary is that word, whatever the merges say.
      compose: text is brought into Unicode's NFC first.
      begins: texts begin with the beginning token where the file does not say.
    """

    split: str | None
    whole_words: bool = False
    compose: bool = False
    begins: bool = False


# By llama.cpp's names of pre-tokenizers.
_BYTE_LEVEL = {
    "smollm": _ByteLevel(None),  # SmolLM 1 and 2
    "llama-bpe": _ByteLevel(_CL100K.format("{1,3}"), whole_words=True, begins=True),  # Llama 3
    "smaug-bpe": _ByteLevel(_CL100K.format("{1,3}"), whole_words=True),  # SmolLM3: Llama 3's, without a beginning
    "qwen2": _ByteLevel(_CL100K.format(""), compose=True),  # Qwen 2, 2.5 and 3
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
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    def get(key: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}")

    def entries(key: str, kind: type = str) -> list[Any]:
        values = get(key)
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: key tokenizer.ggml.{key} is missing; the file is damaged, fetch it again")
        if not all(isinstance(value, kind) for value in values):
            raise UserError(f"{where}: key tokenizer.ggml.{key} holds no {kind.__name__}s; fetch it again")
        return values

    types = entries("token_type", int)
    kind, pre, architecture = get("model"), get("pre"), metadata.get("general.architecture")
    if kind == "gpt2" and pre in _BYTE_LEVEL:
        words, begins = entries("tokens"), _BYTE_LEVEL[pre].begins
        tokenizer = _byte_level(words, entries("merges"), _BYTE_LEVEL[pre], where)
    elif kind == "llama" and architecture in _SENTENCEPIECE:
        # Runs of spaces are stored as spaces, any other space as U+2581.
        words, begins = [word.replace(" ", "▁") for word in entries("tokens")], True
        tokenizer = _sentencepiece(words, types)
    else:
        raise UserError(
            f"{where}: tokenizer {kind}/{pre} of architecture {architecture} is not supported in GGUF files "
            f"(gpt2/{', gpt2/'.join(_BYTE_LEVEL)} and Gemma's are); use the model's Hugging Face directory"
        )
    for special in (True, False):
        wanted = _CONTROL if special else _USER_DEFINED
        typed = zip(words, types, strict=False)
        matched = [word for word, own in typed if own == wanted and word.strip("▁")]  # merges make runs of spaces
        tokenizer.add_tokens([AddedToken(word, special=special, normalized=False) for word in matched])

    def word(key: str) -> str | None:
        index = get(key)
        if index is not None and not 0 <= index < len(words):
            raise UserError(
                f"{where}: tokenizer.ggml.{key} is {index}, beyond its {len(words)} tokens; the file is damaged, fetch it again"
            )
        return None if index is None else words[index]

    end = word("eos_token_id")
    if end is None:
        raise UserError(
            f"{where}: its tokenizer has no end token (tokenizer.ggml.eos_token_id), so no answer would ever end; "
            "use another file of this model"
        )
    add_bos = get("add_bos_token")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=word("bos_token_id"),
        eos_token=end,
        unk_token=word("unknown_token_id"),
        pad_token=word("padding_token_id") or end,  # padding is told by segment, never by id: any token will do
        add_bos_token=begins if add_bos is None else bool(add_bos),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def turn_end_ids(tokenizer: Any) -> list[int]:
    """The special tokens that end a turn of a chat, told by name as llama.cpp tells them: files often name none."""
    return [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in _TURN_ENDS]


def _byte_level(words: list[str], merges: list[str], kind: _ByteLevel, where: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(words)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=kind.whole_words)
    except Exception as error:  # tokenizers raises bare Exception for a merge of unknown tokens
        raise UserError(
            f"{where}: its merges do not fit its vocabulary ({error}); the file is damaged, fetch it again"
        ) from None
    tokenizer = Tokenizer(model)
    if kind.compose:
        tokenizer.normalizer = normalizers.NFC()
    parts = pre_tokenizers.Digits(individual_digits=True)
    if kind.split is not None:
        parts = pre_tokenizers.Split(Regex(kind.split), "isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parts, spelled])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(words: list[str], types: list[int]) -> Any:
    """Gemma's: spaces are letters (U+2581), and what is not in the vocabulary is spelled in bytes.

    SentencePiece joins the two neighbours that make the best word (Kudo & Richardson 2018, arXiv:1808.06226); the
    file has no merges. Gemma's words lie in the order in which they are to be made; the scores in the file place
    runs of spaces and of newlines last. Special tokens and those of bytes are never made of text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {word: i for i, word in enumerate(words)}
    made = [word for word, own in zip(words, types, strict=False) if own in (_NORMAL, _USER_DEFINED)]
    merges = [
        (word[:k], word[k:])
        for word in made
        for k in range(len(word) - 1, 0, -1)
        if word[:k] in vocabulary and word[k:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
