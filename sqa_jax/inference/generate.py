"""Batched generation with a KV cache: one compiled prefill per bucket and one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqa_jax.adapters import adapter as adapters
from sqa_jax.errors import UserError
from sqa_jax.students.decoder import Decoder, init_cache

_BUCKET = 64  # prompts are padded to a multiple of this, so few shapes are compiled


class Generator:
    """Continues prompts until an end token or a number of new tokens.

    Args:
      settings: `config.adapter`.
      eos_ids: tokens that end a text; they are not part of what is returned.
      max_new_tokens: longest text.
      batch: prompts of one call; the last batch is filled up with copies, which are thrown away.
      temperature: 0 is greedy; else samples from softmax(logits / temperature), a pure function of
        (seed, index of the prompt, token).
    """

    def __init__(
        self,
        settings,
        decoder: Decoder,
        eos_ids: Sequence[int],
        max_new_tokens: int,
        batch: int,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        self.settings, self.decoder = settings, decoder
        self.eos_ids, self.max_new_tokens, self.batch = tuple(eos_ids), max_new_tokens, batch
        self.temperature, self.seed = temperature, seed
        self._run = jax.jit(self._generate)

    def _generate(self, adapter: Any, base: Any, tokens: jax.Array, lengths: jax.Array, rows: jax.Array) -> jax.Array:
        """[B, T] right-padded prompts → [B, max_new_tokens] ids, filled with the first end token behind the end."""
        decoder, (B, T) = self.decoder, tokens.shape
        weights = {"params": adapters.weights(adapter, base)}
        adaptation = adapters.activate(self.settings, adapter, decoder.config)
        cache = init_cache(decoder.config, B, T + self.max_new_tokens, adaptation, decoder.dtype)
        eos = jnp.asarray(self.eos_ids, jnp.int32)

        def pick(hidden, step):  # [B, D] → [B]
            logits = decoder.apply(weights, hidden, method="unembed")
            if self.temperature == 0:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), row), step))(
                rows
            )
            return jax.vmap(jax.random.categorical)(keys, logits / self.temperature).astype(jnp.int32)

        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, cache = decoder.apply(weights, tokens, positions, segments, adaptation, cache)
        first = pick(jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0], 0)
        out = jnp.full((B, self.max_new_tokens), eos[0], jnp.int32)

        def unfinished(state):
            step, _, done, _, _ = state
            return (step < self.max_new_tokens) & ~done.all()

        def advance(state):
            step, token, done, out, cache = state
            out = out.at[:, step].set(jnp.where(done, eos[0], token))
            done |= (token[:, None] == eos).any(axis=1)
            position = (lengths + step)[:, None]
            hidden, cache = decoder.apply(weights, token[:, None], position, jnp.ones_like(position), adaptation, cache)
            return step + 1, pick(hidden[:, 0], step + 1), done, out, cache

        state = (jnp.zeros((), jnp.int32), first, jnp.zeros(B, bool), out, cache)
        return jax.lax.while_loop(unfinished, advance, state)[3]

    def __call__(self, adapter: Any, base: Any, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """Yields (index into `prompts`, generated ids without the end token), batch by batch, short prompts first.

        Raises:
          UserError: a prompt and its continuation are longer than the student's positions.
        """
        virtual = adapters.virtual_tokens(self.settings) if "prompt" in adapter else 0
        prompts = [[0] * virtual + list(prompt) for prompt in prompts]
        longest = max(map(len, prompts), default=0) + self.max_new_tokens
        if longest > self.decoder.config.max_positions:
            raise UserError(
                f"prompt and generation take {longest} tokens, more than the student's "
                f"{self.decoder.config.max_positions} positions; lower config.recipe.max_prompt or config.eval.max_new_tokens"
            )
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
        for start in range(0, len(order), self.batch):
            members = order[start : start + self.batch]
            filled = members + [members[-1]] * (self.batch - len(members))
            width = -(-max(len(prompts[k]) for k in filled) // _BUCKET) * _BUCKET
            tokens = np.zeros((self.batch, width), np.int32)
            for row, k in enumerate(filled):
                tokens[row, : len(prompts[k])] = prompts[k]
            lengths = np.array([len(prompts[k]) for k in filled], np.int32)
            out = np.asarray(self._run(adapter, base, tokens, lengths, np.array(filled, np.int32)))
            for row, k in enumerate(members):
                yield k, trim(out[row], self.eos_ids)


def trim(ids: np.ndarray, eos_ids: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    ends = functools.reduce(np.logical_or, (ids == eos for eos in eos_ids))
    return ids[: int(ends.argmax())].tolist() if ends.any() else ids.tolist()
