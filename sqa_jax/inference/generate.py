"""Text generation with continuous batching: slots whose text has ended are refilled by packed prefill.

A slot is a row of the KV cache that holds one text (Yu et al. 2022, Orca, OSDI). Prompts are packed into rows as
training packs its sequences, so that prefill computes next to no padding, and the prefix that all prompts share is
prefilled only once. One compiled program prefills a pack and scatters its keys and values to the free slots. Another
is the decode loop over all slots, on the device; it returns to the host when so many texts have ended that the next
pack fits.

    packs       [p p p q q r r r r ·]  [s s s s t t t u u u]    · is padding
    slots 0     p p p 1 2 3 end → s s s s 1 2 …
          1     q q 1 2 3 4 5 6 7 8 9 …

Shapes: B slots; packs of R rows (one per data shard) of T tokens and at most M prompts; N new tokens at most;
D hidden; cache shapes as in `sqa_jax.models.layers.kv_cache`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sqa_jax import adapters
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.errors import UserError
from sqa_jax.inference.batching import cache_shardings, first_fit, round_up
from sqa_jax.inference.prefix_cache import PrefixKV, SharedPrefixCache, with_shared_prefix
from sqa_jax.models.api import StudentModel, extra_model_inputs
from sqa_jax.models.layers.kv_cache import Cache, init_cache
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.segments import PADDING, PREFIX_LM
from sqa_jax.models.vision.image_input import ImageInputs
from sqa_jax.parallel.mesh import batch_sharding, place_rows, replicated, row_shards
from sqa_jax.parallel.rules import shardings

_LENGTH_MULTIPLE = 128  # of the cache's and the packed rows' lengths, so that few shapes are compiled
_MAX_ROW_LENGTH = 512  # tokens of a packed row at most, where no prompt is longer
_TOKENS_PER_PROMPT = 32  # a packed row of T tokens takes at most T / _TOKENS_PER_PROMPT prompts


class _State(NamedTuple):
    """What stays on the devices between calls, one entry a slot.

    Attributes:
      cache: its length counts a prefix, the prompt, and the new tokens that were fed back.
      token: newest token, which is not in the cache yet.
      new_tokens: generated tokens; those from `num_generated` on are undefined.
      active: whether the slot's text goes on.
      prompt_index: of the slot's text.
      position_offset: by how much images move the slot's positions beyond its number of tokens (M-RoPE).
    """

    cache: Cache
    token: Int[Array, "B"]
    new_tokens: Int[Array, "B N"]
    num_generated: Int[Array, "B"]
    active: Bool[Array, "B"]
    prompt_index: Int[Array, "B"]
    position_offset: Int[Array, "B"]


class _Pack(NamedTuple):
    """Packed prompts.

    Attributes:
      prompt_index, last, slots, position_offset: of each prompt its index, position of its last token in the row, slot
        that it enters (B for none), and as in `_State`.
      images: of the rows, for vision-language models.
    """

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    segments: Int[Array, "R T"]
    prompt_index: Int[Array, "R M"]
    last: Int[Array, "R M"]
    slots: Int[Array, "R M"]
    position_offset: Int[Array, "R M"]
    images: ImageInputs | None = None


class Generator:
    """Continues prompts until an end token or a number of new tokens.

    A text depends on its prompt alone, not on what else is generated, in which order, or on how many devices (but
    for rounding). The constructor computes nothing: the mesh may be of devices that are not attached.

    Args:
      adapter_config: `config.adapter`.
      mesh: slots are sharded over its data axes, key/value heads over `tensor` where it divides them.
      eos_ids: tokens that end a text; they are not part of what is returned.
      max_new_tokens: length of a text at most.
      num_slots: texts decoded at one time; rounded up to a multiple of the data shards.
      temperature: 0 is greedy; else samples from softmax(logits / temperature), a pure function of
        (seed, index of the prompt, number of the token).
      images: of the prompts, for vision-language models.
    """

    def __init__(
        self,
        adapter_config,
        decoder: StudentModel,
        mesh: Mesh,
        eos_ids: Sequence[int],
        max_new_tokens: int,
        num_slots: int,
        temperature: float = 0.0,
        seed: int = 0,
        images: ImageBatcher | None = None,
    ):
        self.adapter_config, self.decoder, self.mesh, self.images = adapter_config, decoder, mesh, images
        self.eos_ids, self.max_new_tokens = tuple(eos_ids), max_new_tokens
        self.packed_rows = row_shards(mesh)
        self.num_slots = round_up(num_slots, self.packed_rows)
        self.temperature, self.seed = temperature, seed
        # Sizes only grow, so that later calls with prompts of like sizes compile nothing.
        self._cache_length = self._row_length = self._features = 0

        by_slot = batch_sharding(mesh)
        state = _State(cache_shardings(decoder.config, mesh), *[by_slot] * 6)  # pyright: ignore[reportArgumentType]
        on_host = replicated(mesh)  # so that every process can read it
        self._shared_prefix_cache = SharedPrefixCache(adapter_config, decoder, mesh)
        self._init_state = jax.jit(self._make_state, static_argnums=2, out_shardings=state)
        self._prefill_jit = jax.jit(self._prefill, donate_argnums=3, out_shardings=state)
        self._decode_jit = jax.jit(
            self._decode, static_argnames="extent", donate_argnums=3, out_shardings=(state, (on_host,) * 3)
        )

    def __call__(
        self, adapter: ParamTree, base: ParamTree, prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (index into `prompts`, generated ids without the end token), as texts end.

        Raises:
          UserError: a prompt and its continuation are longer than the student's maximum length.
        """
        if not prompts:
            return
        longest = max(map(len, prompts)) + self.max_new_tokens
        self._check_length(longest)
        shared = self._shared_prefix_cache(adapter, base, prompts)
        prompts, params = shared.prompts, (adapter, base, shared.kv)
        prefix = shared.length + self._prefix_length(adapter)
        length = round_up(prefix + longest - shared.length, _LENGTH_MULTIPLE)
        length = self._cache_length = max(self._cache_length, length)
        state = self._init_state(adapter, shared.kv, length)
        prompt_of = np.full(self.num_slots, -1)  # index of each slot's prompt; -1 is free
        used = np.zeros(self.num_slots, int)  # positions of its cache that are taken
        T, M, packs = self._plan(prompts)
        for pack in [*packs, None]:
            wanted = self.num_slots if pack is None else sum(map(len, pack))
            while (prompt_of < 0).sum() < wanted:
                extent = next(e for e in _extents(length) if e > used.max())
                state, outputs = self._decode_jit(*params, state, np.int32(self.num_slots - wanted), extent=extent)
                new_tokens, num_generated, active = map(np.asarray, outputs)
                for slot in np.flatnonzero((prompt_of >= 0) & ~active):
                    yield int(prompt_of[slot]), trim(new_tokens[slot, : num_generated[slot]], self.eos_ids)
                    prompt_of[slot], used[slot] = -1, 0
                for slot in np.flatnonzero(prompt_of >= 0):
                    used[slot] = prefix + len(prompts[prompt_of[slot]]) + num_generated[slot] - 1
            if pack is not None:
                free = iter(np.flatnonzero(prompt_of < 0))
                slots = [[int(next(free)) for _ in row] for row in pack]
                for row, members in zip(slots, pack, strict=True):
                    prompt_of[row], used[row] = members, [prefix + len(prompts[k]) for k in members]
                state = self._prefill_jit(*params, state, self._pack(prompts, pack, slots, T, M))

    def _check_length(self, longest: int) -> None:
        if longest > self.decoder.config.max_positions:
            raise UserError(
                f"prompt and generation take {longest} tokens, more than the student's "
                f"{self.decoder.config.max_positions} positions; lower config.recipe.max_prompt or config.eval.max_new_tokens"
            )

    def lower_decode(self, adapter: Any, base: Any, prompt_length: int) -> jax.stages.Lowered:
        """The decode loop, lowered from shapes alone.

        Args:
          adapter, base: trees of shapes and types.
          prompt_length: tokens of the longest prompt, soft prompt tokens included.
        """

        def placed(tree, where):
            return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), tree, where)

        adapter, base = (placed(tree, shardings(tree, self.mesh)) for tree in (adapter, base))
        length = round_up(self._prefix_length(adapter) + prompt_length + self.max_new_tokens, _LENGTH_MULTIPLE)
        state = self._init_state.eval_shape(adapter, None, length)
        max_active = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return self._decode_jit.lower(adapter, base, None, state, max_active, extent=length)

    def _prefix_length(self, adapter: Any) -> int:
        return self.adapter_config.prefix.length if "prefix" in adapter else 0

    def _plan(self, prompts: Sequence[Sequence[int]]) -> tuple[int, int, list[list[list[int]]]]:
        """T, M, and indices of the prompts of each packed row of each pack, the longest prompts first.

        A pack fills about a quarter of the slots, and never more than half: the others go on meanwhile.
        """
        lengths = [len(prompt) for prompt in prompts]
        slots = self.num_slots // self.packed_rows
        quarter = slots * sum(lengths) // (4 * len(lengths))
        longest = max(min(_MAX_ROW_LENGTH, quarter), *lengths)
        T = self._row_length = max(self._row_length, round_up(longest, _LENGTH_MULTIPLE))
        M = max(1, min(slots // 2, T // _TOKENS_PER_PROMPT))
        rows = first_fit(lengths, [1] * len(lengths), T, M)
        return T, M, [rows[start : start + self.packed_rows] for start in range(0, len(rows), self.packed_rows)]

    def _pack(self, prompts, rows: list[list[int]], slots: list[list[int]], T: int, M: int) -> _Pack:
        """A pack on the devices.

        Args:
          rows: indices of the prompts of each packed row.
          slots: the slot that each of them is to enter.
        """
        R = self.packed_rows
        tokens, positions, segments = np.zeros((3, R, T), np.int32)
        prompt_index, last, offset = np.zeros((3, R, M), np.int32)
        entered = np.full((R, M), self.num_slots, np.int32)  # no slot: what is scattered there is dropped
        for row, members in enumerate(rows):
            start = 0
            for number, index in enumerate(members):
                span = slice(start, start + len(prompts[index]))
                tokens[row, span] = prompts[index]
                positions[row, span] = np.arange(len(prompts[index]))
                segments[row, span] = number + 1
                prompt_index[row, number], last[row, number] = index, span.stop - 1
                entered[row, number] = slots[row][number]
                if self.images is not None:
                    offset[row, number] = self.images.position_offset(prompts[index])
                start = span.stop
        images = None
        if self.images is not None:
            self._features = max(
                self._features, self.images.padded_capacity(max(map(self.images.count_features, tokens)))
            )
            tokens, images = self.images.add_images(tokens, self._features)
        arrays = (tokens, positions, segments, prompt_index, last, entered, offset, images)
        return _Pack(*place_rows(arrays, self.mesh, R))

    def _make_state(self, adapter: ParamTree, shared_kv: PrefixKV | None, length: int) -> _State:
        """All slots free."""
        config = self.decoder.config
        adaptation = with_shared_prefix(self.adapter_config, adapter, config, shared_kv)
        slots = length - adaptation.prefix_length
        cache = init_cache(config, self.num_slots, slots, adaptation.prefix, self.decoder.dtype)
        zeros = jnp.zeros(self.num_slots, jnp.int32)
        new_tokens = jnp.zeros((self.num_slots, self.max_new_tokens), jnp.int32)
        return _State(cache, zeros, new_tokens, zeros, zeros.astype(bool), zeros, zeros)

    def _prefill(
        self, adapter: ParamTree, base: ParamTree, shared_kv: PrefixKV | None, state: _State, pack: _Pack
    ) -> _State:
        """Prefills a pack into the slots that it names, and picks each text's first token."""
        adaptation = with_shared_prefix(self.adapter_config, adapter, self.decoder.config, shared_kv)
        params = adapters.model_params(adapter, base)
        decoder = self.decoder.with_max_decoder_tokens(pack.last.shape[1])
        branches = None
        if decoder.config.prefix_lm:
            branches = jnp.where(pack.segments != PADDING, PREFIX_LM, 0)
        inputs = extra_model_inputs(decoder, params, adaptation, branches, pack.images)
        hidden, key, value, segments = decoder.prefill(
            params, pack.tokens, pack.positions, pack.segments, adaptation, **inputs
        )
        cache = self._scatter(state.cache, pack, key, value, segments, adaptation.prefix_length)
        last = jnp.take_along_axis(hidden, pack.last[..., None], axis=1)  # [R, M, D]
        first = self._pick(params, last, pack.prompt_index, jnp.zeros_like(pack.prompt_index))

        def enter(old, new):
            return old.at[pack.slots].set(new, mode="drop")

        return _State(
            cache,
            enter(state.token, first),
            state.new_tokens.at[pack.slots, 0].set(first, mode="drop"),
            enter(state.num_generated, 1),
            enter(state.active, self._continues(first, 1)),
            enter(state.prompt_index, pack.prompt_index),
            enter(state.position_offset, pack.position_offset),
        )

    def _scatter(
        self,
        cache: Cache,
        pack: _Pack,
        key: Float[Array, "L R T K d"],
        value: Float[Array, "L R T K d"],
        segments: Int[Array, "R T"],
        prefix_length: int,
    ) -> Cache:
        """The cache with the keys and values of packed rows in their slots.

        Nothing of a slot's former text needs to be wiped: no token attends to positions after its own.
        """
        slot_of_segment = jnp.pad(pack.slots, ((0, 0), (1, 0)), constant_values=self.num_slots)
        slots = jnp.take_along_axis(slot_of_segment, pack.segments, axis=1)  # [R, T]
        positions = prefix_length + pack.positions
        keys, values = (
            old.at[:, slots, :, positions].set(jnp.moveaxis(new, 0, 2).astype(old.dtype), mode="drop")
            for old, new in ((cache.key, key), (cache.value, value))
        )
        lengths = prefix_length + 1 + jnp.take_along_axis(pack.positions, pack.last, axis=1)
        return Cache(
            keys,
            values,
            cache.segments.at[slots, positions].set(segments, mode="drop"),
            cache.length.at[pack.slots].set(lengths, mode="drop"),
        )

    def _decode(
        self,
        adapter: ParamTree,
        base: ParamTree,
        shared_kv: PrefixKV | None,
        state: _State,
        max_active: Int[Array, ""],
        extent: int,
    ) -> tuple[_State, tuple[Int[Array, "B N"], Int[Array, "B"], Bool[Array, "B"]]]:
        """The decode loop: continues all slots until at most `max_active` texts go on.

        Attention costs as much as the positions that it looks at, so it looks at the first `extent` only: the loop
        also ends when a slot has filled these, and when fewer would do.

        Returns:
          The state, and of it what the host reads: new tokens, their number, and which slots are active.
        """
        adaptation = with_shared_prefix(self.adapter_config, adapter, self.decoder.config, shared_kv)
        params, whole = adapters.model_params(adapter, base), state.cache
        every_slot = jnp.arange(self.num_slots)
        shorter = max((e for e in _extents(whole.segments.shape[1]) if e < extent), default=0)

        def unfinished(state):
            longest = jnp.max(state.cache.length, initial=0, where=state.active)
            return (state.active.sum() > max_active) & (shorter <= longest) & (longest < extent)

        def step(state):
            positions = (state.cache.length - adaptation.prefix_length + state.position_offset)[:, None]
            segments = state.active[:, None].astype(jnp.int32)
            hidden, cache = self.decoder.apply(
                {"params": params}, state.token[:, None], positions, segments, adaptation, state.cache
            )
            token = self._pick(params, hidden[:, 0], state.prompt_index, state.num_generated)
            num_generated = state.num_generated + state.active
            return state._replace(
                cache=cache,
                token=token,
                new_tokens=state.new_tokens.at[every_slot, state.num_generated].set(token, mode="drop"),
                num_generated=num_generated,
                active=state.active & self._continues(token, num_generated),
            )

        state = jax.lax.while_loop(unfinished, step, state._replace(cache=_first_positions(whole, extent)))
        cache = Cache(
            whole.key.at[..., :extent, :].set(state.cache.key),
            whole.value.at[..., :extent, :].set(state.cache.value),
            whole.segments.at[:, :extent].set(state.cache.segments),
            state.cache.length,
        )
        return state._replace(cache=cache), (state.new_tokens, state.num_generated, state.active)

    def _pick(
        self,
        params: ParamTree,
        hidden: Float[Array, "*slots D"],
        prompt_index: Int[Array, "*slots"],
        number: Int[Array, "*slots"],
    ) -> Int[Array, "*slots"]:
        """The next token: the likeliest, or a sample that depends on (seed, prompt, number of the token) alone."""
        logits = self.decoder.apply({"params": params}, hidden, method="unembed")
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        @functools.partial(jnp.vectorize, signature="(v),(),()->()")
        def sample(logits, prompt_index, number):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), prompt_index), number)
            return jax.random.categorical(key, logits / self.temperature)

        return sample(logits, prompt_index, number).astype(jnp.int32)

    def _continues(self, token: Int[Array, "*slots"], count: Int[Array, "*slots"] | int) -> Bool[Array, "*slots"]:
        """Whether a text with this newest token, the `count`th, goes on."""
        return ~jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32)) & (count < self.max_new_tokens)


def trim(ids: Int[np.ndarray, "n"], eos_ids: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    ends = np.isin(ids, eos_ids)
    return ids[: int(ends.argmax())].tolist() if ends.any() else ids.tolist()


def _first_positions(cache: Cache, extent: int) -> Cache:
    """The first positions of every slot."""
    return cache._replace(
        key=cache.key[..., :extent, :], value=cache.value[..., :extent, :], segments=cache.segments[:, :extent]
    )


def _extents(length: int) -> list[int]:
    """The parts of a cache that the decode loop is compiled for, the last of which is all of it."""
    return [e for e in (_LENGTH_MULTIPLE * 2**k for k in range(length.bit_length())) if e < length] + [length]
