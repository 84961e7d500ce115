"""Configuration of a T5 encoder–decoder: T5 1.0, T5 1.1 and FLAN-T5."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.models.validation import check_numbers

_FEED_FORWARD = {"gated-gelu": True, "relu": False}  # T5 1.1's and T5 1.0's


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape and options of a T5 (Raffel et al. 2020, arXiv:1910.10683).

    Attributes:
      vocab_size: rows of the embedding table, which encoder and decoder share.
      hidden_size: D, width of the residual streams.
      intermediate_size: F, width of the MLPs.
      num_encoder_layers: layers of the encoder.
      num_layers: L, layers of the decoder.
      num_heads: H; each has its own keys and values.
      head_dim: d, width of one head; H · d need not be D.
      num_buckets, max_distance: of the relative position bias; all distances from `max_distance` on share a bucket.
      norm_epsilon: of the RMS norms.
      gated: MLPs are gated by an approximated GELU (T5 1.1); else they are plain ones with ReLU (T5 1.0).
      tie_embeddings: the output layer is the transposed embedding table (T5 1.0).
      scale_outputs: the output layer's input is multiplied by D^-1/2 (T5 1.0).
      decoder_start: id of the token that the decoder starts from.
      max_positions: longest sequence that is allowed, prompt and target together. Relative positions have no limit;
        T5 was pretrained on 512 tokens, and FLAN-T5 tuned on up to 2,048.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_encoder_layers: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_buckets: int = 32
    max_distance: int = 128
    norm_epsilon: float = 1e-6
    gated: bool = True
    tie_embeddings: bool = False
    scale_outputs: bool = False
    decoder_start: int = 0
    max_positions: int = 2048

    @property
    def family(self) -> str:
        return "t5"

    @property
    def is_encoder_decoder(self) -> bool:
        return True

    @property
    def bidirectional_prompt(self) -> bool:
        """In the encoder."""
        return True

    @property
    def prefix_lm(self) -> bool:
        return False

    @property
    def vision(self) -> None:
        return None

    @property
    def norm_offset(self) -> bool:
        return False

    @property
    def embedding_scale(self) -> bool:
        return False

    @property
    def stack_depths(self) -> tuple[int, ...]:
        """Layers of encoder and decoder."""
        return self.num_encoder_layers, self.num_layers

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    def linear_shapes(self) -> dict[str, tuple[str, int, int]]:
        """Of each linear layer of both stacks' blocks: its module, input width and output width."""
        D, inner = self.hidden_size, self.num_heads * self.head_dim
        attention = {"q": (D, inner), "k": (D, inner), "v": (D, inner), "o": (inner, D)}
        inputs = ("wi_0", "wi_1") if self.gated else ("wi",)
        mlp = {**{name: (D, self.intermediate_size) for name in inputs}, "wo": (self.intermediate_size, D)}
        modules = {
            "encoder.self_attn": attention, "encoder.mlp": mlp,
            "decoder.self_attn": attention, "decoder.cross_attn": attention, "decoder.mlp": mlp,
        }  # fmt: skip
        return {
            f"{module}.{name}": (module, *shape) for module, layers in modules.items() for name, shape in layers.items()
        }

    def as_stored(self, raw: dict[str, Any], tensors: Collection[str]) -> T5Config:
        """With an untied output layer if the weights hold one, which takes precedence, as in transformers.

        Where they hold none and `config.json` says explicitly that embeddings are not tied, the layer is missing.
        """
        untied = "lm_head.weight" in tensors or raw.get("tie_word_embeddings") is False
        return dataclasses.replace(self, tie_embeddings=not untied)

    def forward_flops(self, tokens: float, context: float, logits: float) -> float:
        """Floating-point operations of a forward pass, see `sqa_jax.models.flops.forward_flops`.

        The decoder processes `logits` tokens, the encoder the others.
        """
        encoded, decoded, length = tokens - logits, logits, 2 * context
        share = encoded / (encoded + decoded)
        # Weights that are applied to encoder tokens, to decoder tokens, and to encoder outputs in every decoder layer.
        linear = {"encoder": 0, "decoder": 0, "crossed": 0}
        for name, (module, rows, columns) in self.linear_shapes().items():
            across = module == "decoder.cross_attn" and name.endswith((".k", ".v"))
            linear["crossed" if across else module.split(".")[0]] += rows * columns
        heads = 2 * self.num_heads * self.head_dim  # scores, and the weighted sum of values, for one key
        encoder = encoded * self.num_encoder_layers * (linear["encoder"] + heads * share * length)
        keys = share * length + (1 - share) * length / 2
        decoder = self.num_layers * (decoded * (linear["decoder"] + heads * keys) + encoded * linear["crossed"])
        return 2 * (encoder + decoder + decoded * self.hidden_size * self.vocab_size)


def from_hf(raw: dict[str, Any], where: str) -> T5Config:
    """A T5's options from Hugging Face's `config.json`.

    Raises:
      UserError: an option is not supported, a key is missing, or a size is not a positive number.
    """
    feed_forward = raw.get("feed_forward_proj", "relu")
    if feed_forward not in _FEED_FORWARD:
        raise UserError(
            f"{where}: feed_forward_proj {feed_forward!r} is not supported; supported: {', '.join(_FEED_FORWARD)}"
        )
    # T5 1.0 ties embeddings and scales outputs, 1.1 does neither; files say so with one key, transformers 5 with two.
    tied = bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)))
    try:
        config = T5Config(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["d_model"],
            intermediate_size=raw["d_ff"],
            num_encoder_layers=raw["num_layers"],
            num_layers=raw.get("num_decoder_layers") or raw["num_layers"],
            num_heads=raw["num_heads"],
            head_dim=raw["d_kv"],
            num_buckets=raw.get("relative_attention_num_buckets", 32),
            max_distance=raw.get("relative_attention_max_distance", 128),
            norm_epsilon=raw.get("layer_norm_epsilon", 1e-6),
            gated=_FEED_FORWARD[feed_forward],
            tie_embeddings=tied,
            scale_outputs=tied,
            decoder_start=decoder_start(raw),
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; fetch the model's config.json again") from None
    return _checked(config, where)


def decoder_start(raw: dict[str, Any]) -> int:
    """The id of the token that the decoder starts from, from a T5's `config.json`."""
    start = raw.get("decoder_start_token_id")
    return raw.get("pad_token_id", 0) if start is None else start


def _checked(config: T5Config, where: str) -> T5Config:
    check_numbers(config, where, ("decoder_start",))
    if config.decoder_start >= config.vocab_size:
        raise UserError(
            f"{where}: decoder_start_token_id {config.decoder_start} is not one of the model's {config.vocab_size} "
            "tokens; fetch the model again"
        )
    if config.num_buckets % 4 or config.max_distance <= config.num_buckets // 2:
        raise UserError(
            f"{where}: {config.num_buckets} buckets of relative positions up to {config.max_distance} cannot be "
            "divided into near and far ones on both sides; fetch the model again"
        )
    return config


def to_hf(config: T5Config) -> dict[str, Any]:
    """The `config.json` that transformers reads as the same model."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": next(name for name, gated in _FEED_FORWARD.items() if gated == config.gated),
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_outputs,
        "decoder_start_token_id": config.decoder_start,
        "pad_token_id": config.decoder_start,
    }
