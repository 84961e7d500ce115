"""What all prompts begin with is read once: a soft prompt, and the first lines of a chat template.

Its keys and values then lie in front of every prompt, as a trained prefix does.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sqa_jax import adapters
from sqa_jax.models.api import Module, prefill
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.layers.kv_cache import Adaptation
from sqa_jax.models.t5.config import T5Config
from sqa_jax.parallel.mesh import replicated

_STEP = 8  # its length is a multiple of this, so that few shapes are compiled


def shared_prefix_length(prompts: Sequence[Sequence[int]], vocabulary: int) -> int:
    """Tokens of the common beginning of all prompts, each of which keeps some of its own.

    Args:
      vocabulary: from this token on they show pictures, before which the beginning ends.
    """
    if len(prompts) < 2:
        return 0
    common = os.path.commonprefix([list(prompt) for prompt in prompts])
    words = next((place for place, token in enumerate(common) if token >= vocabulary), len(common))
    return min(words, min(map(len, prompts)) - 1) // _STEP * _STEP


class SharedPrefix(NamedTuple):
    """Prompts whose common beginning has been read.

    Attributes:
      length: its tokens.
      kv: their keys and values, which `with_shared_prefix` takes, [L, length, K·d] each; None where there are none.
      rest: what each prompt goes on with.
    """

    length: int
    kv: dict[str, jax.Array] | None
    rest: list[Sequence[int]]


class SharedPrefixCache:
    """Reads the common beginning of prompts.

    Where a prompt is read both ways, nothing of it is read before all of it is there, so such prompts have none.

    Args:
      settings: `config.adapter`.
    """

    def __init__(self, settings, decoder: Module, mesh: Mesh):
        self._settings, self._decoder = settings, decoder
        self._run = jax.jit(self._read, out_shardings=replicated(mesh))

    def __call__(self, adapter: Any, base: Any, prompts: Sequence[Sequence[int]]) -> SharedPrefix:
        config = self._decoder.config
        whole = config.prefix_lm or isinstance(config, T5Config)
        length = 0 if whole else shared_prefix_length(prompts, config.vocab_size)
        kv = self._run(adapter, base, np.asarray([prompts[0][:length]], np.int32)) if length else None
        return SharedPrefix(length, kv, [prompt[length:] for prompt in prompts])

    def _read(self, adapter: Any, base: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        adaptation = adapters.adapter_inputs(self._settings, adapter, self._decoder.config)
        positions = jnp.arange(tokens.shape[1])[None]
        weights = adapters.model_params(adapter, base)
        decoder = self._decoder.clone(fused=None, rows=None)  # it is one short row
        _, key, value, _ = prefill(decoder, weights, tokens, positions, jnp.ones_like(positions), adaptation)
        flat = (key.shape[0], key.shape[2], -1)
        return {"key": key.reshape(flat), "value": value.reshape(flat)}


def with_shared_prefix(
    settings, adapter: Any, student: StudentConfig, beginning: dict[str, jax.Array] | None
) -> Adaptation:
    """The adapter in the form that the decoder uses, behind which prompts go on where their beginning ends."""
    adaptation = adapters.adapter_inputs(settings, adapter, student)
    if beginning is None:
        return adaptation
    prefix = beginning
    if adaptation.prefix is not None:
        prefix = {name: jnp.concatenate([adaptation.prefix[name], beginning[name]], axis=1) for name in beginning}
    return adaptation._replace(prefix=prefix)
