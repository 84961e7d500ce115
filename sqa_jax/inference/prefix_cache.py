"""Shared prefix cache: the tokens that all prompts begin with are prefilled once.

These are a soft prompt and the first lines of a chat template. Their keys and values are then prepended to every
prompt's, as those of a trained prefix are (prefix tuning).
"""

from __future__ import annotations

import functools
import os.path
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import FrozenConfigDict

from sqa_jax import adapters
from sqa_jax.models.adaptation import Adaptation
from sqa_jax.models.api import StudentModel
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.mesh import replicated

_LENGTH_MULTIPLE = 8  # of a shared prefix, so that few shapes are compiled

PrefixKV = dict[str, Float[Array, "L P kd"]]  # "key" and "value", heads flattened into the last dimension


def shared_prefix_length(prompts: Sequence[Sequence[int]], vocab_size: int) -> int:
    """Number of leading tokens that all prompts share; each prompt keeps at least one token after them.

    Args:
      vocab_size: tokens from this id on stand for image features, before which a shared prefix ends.
    """
    if len(prompts) < 2:
        return 0
    common = os.path.commonprefix([list(prompt) for prompt in prompts])
    text = next((k for k, token in enumerate(common) if token >= vocab_size), len(common))
    return min(text, min(map(len, prompts)) - 1) // _LENGTH_MULTIPLE * _LENGTH_MULTIPLE


class SharedPrefix(NamedTuple):
    """Prompts whose shared prefix has been prefilled.

    Attributes:
      length: tokens of the prefix.
      kv: their keys and values, for `with_shared_prefix`; None where the length is 0.
      prompts: the rest of each prompt.
    """

    length: int
    kv: PrefixKV | None
    prompts: list[Sequence[int]]


class SharedPrefixCache:
    """Prefills the shared prefix of prompts.

    Where attention is bidirectional within the prompt (prefix LM, encoder–decoder), the states of its first tokens
    depend on the later ones, so nothing is shared.

    Args:
      adapter_config: `config.adapter`.
    """

    def __init__(self, adapter_config, decoder: StudentModel, mesh: Mesh):
        self._decoder = decoder
        self._prefill_jit = _shared_prefill(FrozenConfigDict(adapter_config), decoder, mesh)

    def __call__(self, adapter: ParamTree, base: ParamTree, prompts: Sequence[Sequence[int]]) -> SharedPrefix:
        config = self._decoder.config
        length = 0 if config.bidirectional_prompt else shared_prefix_length(prompts, config.vocab_size)
        kv = None
        if length:
            kv = self._prefill_jit(adapter, base, np.asarray([prompts[0][:length]], np.int32))
        return SharedPrefix(length, kv, [prompt[length:] for prompt in prompts])


@functools.lru_cache(maxsize=4)
def _shared_prefill(adapter_config, decoder: StudentModel, mesh: Mesh):
    """The compiled prefill of all `SharedPrefixCache`s with equal settings: (adapter, base, tokens)."""

    def prefill(adapter: ParamTree, base: ParamTree, tokens: Int[Array, "1 P"]) -> PrefixKV:
        adaptation = adapters.adapter_inputs(adapter_config, adapter, decoder.config)
        positions = jnp.arange(tokens.shape[1])[None]
        params = adapters.model_params(adapter, base)
        local = decoder.clone(fused=None, batch_sharding=None)  # one short row: not sharded
        _, key, value, _ = local.prefill(params, tokens, positions, jnp.ones_like(positions), adaptation)
        flat = (key.shape[0], key.shape[2], -1)
        return {"key": key.reshape(flat), "value": value.reshape(flat)}

    return jax.jit(prefill, out_shardings=replicated(mesh))


def with_shared_prefix(
    adapter_config, adapter: ParamTree, student: StudentConfig, shared_kv: PrefixKV | None
) -> Adaptation:
    """The adapter as the model takes it, the shared prefix's keys and values appended to those of a trained prefix."""
    adaptation = adapters.adapter_inputs(adapter_config, adapter, student)
    if shared_kv is None:
        return adaptation
    prefix = shared_kv
    if (trained := adaptation.prefix) is not None:
        prefix = {name: jnp.concatenate([trained[name], shared_kv[name]], axis=1) for name in shared_kv}
    return adaptation._replace(prefix=prefix)
