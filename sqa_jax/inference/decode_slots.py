"""Multi-turn decoding in one KV cache with chunked prefill: each slot holds a dialogue, whatever turn it is at.

Two compiled programs do all of it. One prefills what each slot has pending and scores continuations as masked
branches after it, which leave nothing in the cache; long input is prefilled in chunks, so that slots of all lengths
share a step (Agrawal et al. 2023, arXiv:2308.16369). Tokens of all slots are packed: only attention works per slot.
The other decodes greedily, and pauses when so many slots have ended that others should take their places.

    slot 0   q q q q q q  c c r r r r        | a a |  b b b     a question, a call and its result, two continuations
    slot 1   q q q q                         | a | b b
    slot 2   q q q …                                           prefill goes on in the next step

Shapes: B slots, R packed rows (one per data shard) of T tokens and M scored tokens, A slots prefilled in a step with
at most W tokens each, N new tokens at most; cache shapes as in `sqa_jax.models.layers.kv_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sqa_jax.adapters import adapter as adapters
from sqa_jax.inference.batching import cache_shardings, round_up
from sqa_jax.inference.generate import trim
from sqa_jax.inference.likelihood import BranchedSequence, MultipleChoice, branched_sequence
from sqa_jax.inference.prefix_cache import PrefixKV, SharedPrefixCache, with_shared_prefix
from sqa_jax.models.api import StudentModel
from sqa_jax.models.layers.kv_cache import Cache, PackedToCacheMap, init_cache
from sqa_jax.models.log_probs import target_log_probs
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.parallel.mesh import place_rows, replicated, row_shards

_WIDTHS = (16, 64, 256)  # W that attention is compiled for; above these, multiples of 256
_MAX_CHUNK = 256  # prefilled tokens of one slot in a step, where one step need not take more
_MAX_STEP_TOKENS = 4096  # of all slots in a step
_EXTENT_MULTIPLE = 256  # attention looks at a multiple of so many positions of the cache


class _Slot(NamedTuple):
    """A slot's state on the host.

    Attributes:
      length: tokens in the cache, without the shared prefix.
      pending: tokens to prefill.
      options: continuations to score after them; None where nothing was enqueued.
      generated: the token that decoding started from and the generated ones; the newest is not in the cache yet.
      max_new_tokens: tokens that may be generated.
    """

    length: int = 0
    pending: tuple[int, ...] = ()
    options: tuple[tuple[int, ...], ...] | None = None
    generated: tuple[int, ...] = ()
    max_new_tokens: int = 0


class _Prefill(NamedTuple):
    """Packed tokens of a prefill step; see `sqa_jax.inference.likelihood` for branches and targets."""

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    segments: Int[Array, "R T"]
    branches: Int[Array, "R T"]
    target_positions: Int[Array, "R M"]
    targets: Int[Array, "R M"]


class _DecodeInputs(NamedTuple):
    """What the decode loop starts from: newest token of each slot, tokens it may generate, length in the cache."""

    token: Int[Array, "B"]
    max_new_tokens: Int[Array, "B"]
    length: Int[Array, "B"]


class DecodeSlots:
    """Slots of one KV cache, each for one dialogue at a time.

    Args:
      adapter_config: `config.adapter`.
      mesh: slots are sharded over its data axes, key/value heads over `tensor` where it divides them.
      num_slots: rounded up to a multiple of the data shards.
      max_tokens: of a dialogue, without the shared prefix.
      end_ids: tokens that end generated text; they are not part of it.
      max_new_tokens: tokens generated in one turn at most.
    """

    def __init__(
        self,
        adapter_config,
        decoder: StudentModel,
        mesh: Mesh,
        num_slots: int,
        max_tokens: int,
        end_ids: Sequence[int],
        max_new_tokens: int,
    ):
        self.adapter_config, self.mesh, self.max_tokens = adapter_config, mesh, max_tokens
        self.decoder = decoder.clone(fused=None)
        self.end_ids, self.max_new_tokens = tuple(end_ids), max_new_tokens
        self.num_slots = round_up(num_slots, row_shards(mesh))
        self.shared_prefix_length = 0  # tokens; set by `start`
        cache, on_host = cache_shardings(decoder.config, mesh), replicated(mesh)
        self._shared_prefix_cache = SharedPrefixCache(adapter_config, decoder, mesh)
        self._init_cache = jax.jit(self._make_cache, out_shardings=cache)
        self._prefill_jit = jax.jit(
            self._prefill, static_argnames="extent", donate_argnums=3, out_shardings=(cache, on_host)
        )
        self._decode_jit = jax.jit(
            self._decode, static_argnames="extent", donate_argnums=3, out_shardings=(cache, (on_host,) * 3)
        )
        self._slots = [_Slot()] * self.num_slots

    def start(self, adapter: ParamTree, base: ParamTree, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Empties all slots and prefills the prefix that all prompts share, once.

        Returns:
          The rest of each prompt, to be given to `enqueue`.
        """
        shared = self._shared_prefix_cache(adapter, base, prompts)
        self.shared_prefix_length = shared.length
        self._params = (adapter, base, shared.kv)
        self._cache = self._init_cache(adapter, shared.kv)
        self._slots = [_Slot()] * self.num_slots
        return [list(prompt) for prompt in shared.prompts]

    def reset(self, slot: int) -> None:
        """Empties a slot for a new dialogue."""
        self._slots[slot] = _Slot()

    def enqueue(self, slot: int, tokens: Sequence[int], options: Sequence[Sequence[int]] = ()) -> None:
        """Appends tokens to a slot's dialogue, and asks for the scores of continuations after them.

        Raises:
          ValueError: there is nothing to prefill, or tokens and continuations do not fit.
        """
        state = self._slots[slot]
        if not state.pending and not tokens:
            raise ValueError("continuations are scored after at least one prefilled token")
        if self.remaining_tokens(slot) < len(tokens) + sum(map(len, options)):
            raise ValueError(
                f"{len(tokens)} tokens and their continuations do not fit into the slot's {self.remaining_tokens(slot)}"
            )
        self._slots[slot] = state._replace(
            pending=state.pending + tuple(tokens), options=tuple(tuple(option) for option in options)
        )

    def remaining_tokens(self, slot: int) -> int:
        """Tokens that still fit into a slot, besides those that are pending."""
        return self.max_tokens - self._slots[slot].length - len(self._slots[slot].pending)

    @property
    def pending(self) -> bool:
        """Whether a slot has something to prefill."""
        return any(slot.options is not None for slot in self._slots)

    def prefill_step(self) -> list[tuple[int, list[np.ndarray]]]:
        """Prefills one step's chunks.

        Returns:
          Of each slot that has now prefilled everything: (slot, log-probabilities of each continuation's tokens; what
          all continuations begin with is left out).
        """
        active, sequences = self._next_step()
        sizes = {slot: len(sequence.tokens) for slot, sequence in sequences.items()}
        # The hidden state of the last prompt token scores the first token of each option: both are in one step.
        chunk = max([_MAX_CHUNK] + [sizes[slot] - len(state.pending) + 1 for slot, state in active.items()])
        done = [slot for slot in active if sizes[slot] <= chunk]
        parts: dict[int, BranchedSequence] = {}
        for slot, state in active.items():
            if slot in done:
                size, options, parts[slot] = len(state.pending), None, sequences[slot]
            else:
                size, options = min(chunk, len(state.pending) - 1), state.options
                parts[slot] = branched_sequence(MultipleChoice(state.pending[:size], ()))
            self._slots[slot] = _Slot(state.length + size, state.pending[size:], options)
        lengths = {slot: state.length for slot, state in active.items()}
        batch, scored = self._pack(parts, lengths)
        extent = self._extent(max(lengths[slot] + len(part.tokens) for slot, part in parts.items()))
        self._cache, log_probs = self._prefill_jit(*self._params, self._cache, *batch, extent=extent)
        if not done:
            return []
        log_probs = np.asarray(log_probs)
        results = []
        for slot in done:
            of_slot, option = log_probs[scored[slot]], sequences[slot].target_options
            results.append((slot, [of_slot[option == k] for k in range(len(active[slot].options or ()))]))
        return results

    def _next_step(self) -> tuple[dict[int, _Slot], dict[int, BranchedSequence]]:
        """The slots that are prefilled in the next step, as many as it takes, and the sequences of each."""
        active, sequences, total = {}, {}, 0
        for slot, state in enumerate(self._slots):
            if state.options is not None:
                sequence = branched_sequence(MultipleChoice(state.pending, state.options))
                total += min(len(sequence.tokens), _MAX_CHUNK)
                if active and total > _MAX_STEP_TOKENS:
                    break
                active[slot], sequences[slot] = state, sequence
        return active, sequences

    def _extent(self, length: int) -> int:
        """Positions of the cache that attention looks at, rounded up to one of few sizes that are compiled."""
        return min(round_up(length, _EXTENT_MULTIPLE), self.max_tokens)

    def _pack(
        self, parts: Mapping[int, BranchedSequence], lengths: Mapping[int, int]
    ) -> tuple[tuple[_Prefill, PackedToCacheMap, np.ndarray], dict[int, tuple[int, slice]]]:
        """The inputs of a prefill step, and where in its log-probabilities [R, M] those of each slot are."""
        R = row_shards(self.mesh)
        row_of = {slot: slot * R // self.num_slots for slot in parts}
        counts, target_counts = np.zeros(R, int), np.zeros(R, int)
        for slot, part in parts.items():
            counts[row_of[slot]] += len(part.tokens)
            target_counts[row_of[slot]] += len(part.targets)
        T, M = padded_size(int(counts.max())), padded_size(max(1, int(target_counts.max())))
        A = min(self.num_slots, 1 << (len(parts) - 1).bit_length())
        longest = max(len(part.tokens) for part in parts.values())
        W = next((width for width in _WIDTHS if width >= longest), round_up(longest, _WIDTHS[-1]))
        tokens, positions, segments, branches = np.zeros((4, R, T), np.int32)
        target_positions, targets = np.zeros((2, R, M), np.int32)
        rows, packed = np.full(A, self.num_slots, np.int32), np.full((A, W), R * T, np.int32)
        back = np.full(R * T, A * W, np.int32)
        length, scored = np.zeros(self.num_slots, np.int32), {}
        ends, target_ends = np.zeros(R, int), np.zeros(R, int)
        for k, (slot, part) in enumerate(parts.items()):
            row = row_of[slot]
            span = slice(int(ends[row]), int(ends[row]) + len(part.tokens))
            target_span = slice(int(target_ends[row]), int(target_ends[row]) + len(part.targets))
            tokens[row, span], positions[row, span] = part.tokens, lengths[slot] + part.positions
            segments[row, span], branches[row, span] = 1, part.branches
            target_positions[row, target_span] = span.start + part.target_positions
            targets[row, target_span] = part.targets
            rows[k], length[slot], scored[slot] = slot, lengths[slot], (row, target_span)
            indices = row * T + np.arange(span.start, span.stop)
            packed[k, : len(indices)], back[indices] = indices, k * W + np.arange(len(indices))
            ends[row], target_ends[row] = span.stop, target_span.stop
        cache_map = PackedToCacheMap(rows, packed, back)  # pyright: ignore[reportArgumentType]
        packed_arrays = (tokens, positions, segments, branches, target_positions, targets)
        return (_Prefill(*place_rows(packed_arrays, self.mesh, R)), cache_map, length), scored

    def decode(self, first_tokens: Mapping[int, int], pause_at: int = 0) -> dict[int, list[int]]:
        """Decodes greedily, each slot until an end token, `max_new_tokens` tokens, or its last position.

        Args:
          first_tokens: of each slot that starts to generate, the token that it continues from, which is not in the
            cache yet. There must be room for it and one more.
          pause_at: returns as soon as no more than so many slots are still generating; a later call continues them.

        Returns:
          Of each slot that has ended its generated tokens, without an end token. All of them stay in the dialogue;
          `truncate` takes some back.
        """
        for slot, first in first_tokens.items():
            limit = min(self.max_new_tokens, self.remaining_tokens(slot) - 1)
            self._slots[slot] = self._slots[slot]._replace(generated=(first,), max_new_tokens=limit)
        token, max_new_tokens = np.zeros(self.num_slots, np.int32), np.zeros(self.num_slots, np.int32)
        generating = {slot: state for slot, state in enumerate(self._slots) if state.generated}
        for slot, state in generating.items():
            token[slot], max_new_tokens[slot] = state.generated[-1], state.max_new_tokens - (len(state.generated) - 1)
        length = np.asarray([state.length for state in self._slots], np.int32)
        extent = self._extent(int((length + max_new_tokens).max()))
        inputs = _DecodeInputs(*place_rows((token, max_new_tokens, length), self.mesh, self.num_slots))
        pause_at = min(pause_at, len(generating) - 1)
        self._cache, outputs = self._decode_jit(*self._params, self._cache, inputs, np.int32(pause_at), extent=extent)
        new_tokens, num_generated, active = map(np.asarray, outputs)
        texts = {}
        for slot, state in generating.items():
            generated = state.generated + tuple(new_tokens[slot, : num_generated[slot]].tolist())
            length_now = state.length + int(num_generated[slot])
            if active[slot]:
                self._slots[slot] = state._replace(length=length_now, generated=generated)
            else:
                texts[slot] = ids = trim(np.asarray(generated[1:]), self.end_ids)
                newest = tuple(ids[len(generated) - 2 :])  # not in the cache yet
                self._slots[slot] = _Slot(length_now, newest)
        return texts

    def truncate(self, slot: int, generated: Sequence[int], keep: int) -> None:
        """Of what a slot has just generated, removes all but the first `keep` tokens."""
        state = self._slots[slot]
        excess, pending = len(generated) - keep, len(state.pending)
        self._slots[slot] = _Slot(state.length - max(0, excess - pending), state.pending[: max(0, pending - excess)])

    def _make_cache(self, adapter: ParamTree, shared_kv: PrefixKV | None) -> Cache:
        adaptation = with_shared_prefix(self.adapter_config, adapter, self.decoder.config, shared_kv)
        return init_cache(self.decoder.config, self.num_slots, self.max_tokens, adaptation.prefix, self.decoder.dtype)

    def _prefill(
        self,
        adapter: ParamTree,
        base: ParamTree,
        shared_kv: PrefixKV | None,
        cache: Cache,
        batch: _Prefill,
        cache_map: PackedToCacheMap,
        length: Int[Array, "B"],
        extent: int,
    ) -> tuple[Cache, Float[Array, "R M"]]:
        """The cache with the prefilled tokens, and the targets' log-probabilities."""
        adaptation = with_shared_prefix(self.adapter_config, adapter, self.decoder.config, shared_kv)
        params = adapters.model_params(adapter, base)
        P = adaptation.prefix_length
        cache = cache._replace(length=P + length)
        hidden, cache = self.decoder.apply(
            {"params": params}, batch.tokens, batch.positions, batch.segments, adaptation, cache, batch.branches,
            attended_slots=P + extent, cache_map=cache_map,
        )  # fmt: skip
        return cache, target_log_probs(self.decoder, params, hidden, batch.target_positions, batch.targets)

    def _decode(
        self,
        adapter: ParamTree,
        base: ParamTree,
        shared_kv: PrefixKV | None,
        cache: Cache,
        inputs: _DecodeInputs,
        pause_at: Int[Array, ""],
        extent: int,
    ) -> tuple[Cache, tuple[Int[Array, "B N"], Int[Array, "B"], Bool[Array, "B"]]]:
        """The decode loop: the cache, new tokens, how many each slot has generated, and which are still generating."""
        adaptation = with_shared_prefix(self.adapter_config, adapter, self.decoder.config, shared_kv)
        params = adapters.model_params(adapter, base)
        P, B = adaptation.prefix_length, self.num_slots

        def unfinished(state):
            return state[-1].sum() > pause_at

        def step(state):
            cache, token, new_tokens, count, active = state
            positions, segments = (cache.length - P)[:, None], active[:, None].astype(jnp.int32)
            hidden, cache = self.decoder.apply(
                {"params": params}, token[:, None], positions, segments, adaptation, cache, attended_slots=P + extent
            )
            logits = self.decoder.apply({"params": params}, hidden[:, 0], method="unembed")
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            column = jnp.where(active, count, new_tokens.shape[1])
            new_tokens = new_tokens.at[jnp.arange(B), column].set(token, mode="drop")
            count += active
            active &= ~jnp.isin(token, jnp.asarray(self.end_ids, jnp.int32)) & (count < inputs.max_new_tokens)
            return cache, token, new_tokens, count, active

        cache = cache._replace(length=P + inputs.length)
        new_tokens = jnp.zeros((B, self.max_new_tokens), jnp.int32)
        start = (cache, inputs.token, new_tokens, jnp.zeros(B, jnp.int32), inputs.max_new_tokens > 0)
        cache, _, new_tokens, count, active = jax.lax.while_loop(unfinished, step, start)
        return cache, (new_tokens, count, active)


def padded_size(count: int) -> int:
    """A count rounded up by an eighth on average, so that few sizes are compiled."""
    return round_up(count, max(16, 1 << max(0, count.bit_length() - 3)))
