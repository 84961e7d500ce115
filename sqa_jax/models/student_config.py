"""What every model's configuration offers, whichever family it is of; needs no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from sqa_jax.models.vision.registry import VisionConfig


class StudentConfig(Protocol):
    """Shape and options of a model: a `DecoderConfig` or a `T5Config`, frozen dataclasses whose fields these mostly are."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def family(self) -> str:
        """The architecture's name in Hugging Face's `model_type`; of a vision-language model, the language model's."""
        ...

    @property
    def is_encoder_decoder(self) -> bool: ...

    @property
    def decoder_start(self) -> int | None:
        """Id of the token that an encoder–decoder's decoder starts from; None for a decoder-only model."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, rows of the embedding table."""
        ...

    @property
    def hidden_size(self) -> int:
        """D, width of the residual stream."""
        ...

    @property
    def intermediate_size(self) -> int:
        """F, width of the MLPs."""
        ...

    @property
    def num_layers(self) -> int:
        """L, layers of the decoder."""
        ...

    @property
    def stack_depths(self) -> tuple[int, ...]:
        """Layers of each stack: encoder, if there is one, and decoder."""
        ...

    @property
    def num_heads(self) -> int:
        """H, query heads."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """K, key/value heads."""
        ...

    @property
    def head_dim(self) -> int:
        """d, width of one head."""
        ...

    @property
    def tie_embeddings(self) -> bool:
        """Whether the output layer is the transposed embedding table."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model supports."""
        ...

    @property
    def embedding_scale(self) -> bool:
        """Whether token embeddings are multiplied by √D."""
        ...

    @property
    def norm_offset(self) -> bool:
        """Whether RMS norms multiply by one plus their weight."""
        ...

    @property
    def prefix_lm(self) -> bool:
        """Whether attention is bidirectional within the prompt of one decoder (prefix LM)."""
        ...

    @property
    def bidirectional_prompt(self) -> bool:
        """Whether a prompt's states depend on all of it: a prefix LM or an encoder. No part of it can be cached alone."""
        ...

    @property
    def vision(self) -> VisionConfig | None:
        """The vision encoder of a vision-language model; None for a text-only model."""
        ...

    def linear_shapes(self) -> dict[str, tuple[str, int, int]]:
        """Of each linear layer of a block: its module, input width and output width."""
        ...

    def as_stored(self, raw: dict[str, Any], tensors: Collection[str]) -> StudentConfig:
        """The configuration, given what `config.json` says (`raw`) and which tensors the weights hold."""
        ...

    def forward_flops(self, tokens: float, context: float, logits: float) -> float:
        """Floating-point operations of a forward pass, see `sqa_jax.models.flops.forward_flops`."""
        ...
