"""The compiled programs of text generation: prefill of packed prompts into the KV cache's slots, and the decode loop.

Shapes: B slots; packs of R rows of T tokens and at most M prompts; N new tokens at most; L layers, K key/value heads of
width d, D hidden; cache shapes as in `sqa_jax.models.layers.kv_cache`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import FrozenConfigDict

from sqa_jax import adapters
from sqa_jax.inference.batching import cache_shardings
from sqa_jax.inference.prefix_cache import PrefixKV, with_shared_prefix
from sqa_jax.models.api import StudentModel, extra_model_inputs
from sqa_jax.models.layers.kv_cache import Cache, init_cache
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.segments import PADDING, PREFIX_LM
from sqa_jax.models.vision.image_input import ImageInputs
from sqa_jax.parallel.mesh import batch_sharding, replicated

LENGTH_MULTIPLE = 128  # of the cache's and the packed rows' lengths, so that few shapes are compiled


class State(NamedTuple):
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


class Pack(NamedTuple):
    """Packed prompts.

    Attributes:
      prompt_index, last, slots, position_offset: of each prompt its index, position of its last token in the row, slot
        that it enters (B for none), and as in `State`.
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


class Programs(NamedTuple):
    """What generation computes on the devices; the settings are those of `Generator`.

    It holds no array, and equal ones share their compiled functions, see `compile_programs`.
    """

    adapter_config: FrozenConfigDict
    decoder: StudentModel
    mesh: Mesh
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    num_slots: int
    temperature: float
    seed: int

    def init_state(self, adapter: ParamTree, shared_kv: PrefixKV | None, length: int) -> State:
        """All slots free."""
        config = self.decoder.config
        adaptation = with_shared_prefix(self.adapter_config, adapter, config, shared_kv)
        slots = length - adaptation.prefix_length
        cache = init_cache(config, self.num_slots, slots, adaptation.prefix, self.decoder.dtype)
        zeros = jnp.zeros(self.num_slots, jnp.int32)
        new_tokens = jnp.zeros((self.num_slots, self.max_new_tokens), jnp.int32)
        return State(cache, zeros, new_tokens, zeros, zeros.astype(bool), zeros, zeros)

    def prefill(
        self, adapter: ParamTree, base: ParamTree, shared_kv: PrefixKV | None, state: State, pack: Pack
    ) -> State:
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
        cache = self.scatter(state.cache, pack, key, value, segments, adaptation.prefix_length)
        last = jnp.take_along_axis(hidden, pack.last[..., None], axis=1)  # [R, M, D]
        first = self.pick(params, last, pack.prompt_index, jnp.zeros_like(pack.prompt_index))

        def enter(old, new):
            return old.at[pack.slots].set(new, mode="drop")

        return State(
            cache,
            enter(state.token, first),
            state.new_tokens.at[pack.slots, 0].set(first, mode="drop"),
            enter(state.num_generated, 1),
            enter(state.active, self.continues(first, 1)),
            enter(state.prompt_index, pack.prompt_index),
            enter(state.position_offset, pack.position_offset),
        )

    def scatter(
        self,
        cache: Cache,
        pack: Pack,
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

    def decode(
        self,
        adapter: ParamTree,
        base: ParamTree,
        shared_kv: PrefixKV | None,
        state: State,
        max_active: Int[Array, ""],
        extent: int,
    ) -> tuple[State, tuple[Int[Array, "B N"], Int[Array, "B"], Bool[Array, "B"]]]:
        """The decode loop: continues all slots until at most `max_active` texts go on.

        Attention costs as much as the positions that it looks at, so it looks at the first `extent` only: the loop
        also ends when a slot has filled these, and when fewer would do.

        Returns:
          The state, and of it what the host reads: new tokens, their number, and which slots are active.
        """
        adaptation = with_shared_prefix(self.adapter_config, adapter, self.decoder.config, shared_kv)
        params, whole = adapters.model_params(adapter, base), state.cache
        every_slot = jnp.arange(self.num_slots)
        shorter = max((e for e in extents(whole.segments.shape[1]) if e < extent), default=0)

        def unfinished(state):
            longest = jnp.max(state.cache.length, initial=0, where=state.active)
            return (state.active.sum() > max_active) & (shorter <= longest) & (longest < extent)

        def step(state):
            positions = (state.cache.length - adaptation.prefix_length + state.position_offset)[:, None]
            segments = state.active[:, None].astype(jnp.int32)
            hidden, cache = self.decoder.apply(
                {"params": params}, state.token[:, None], positions, segments, adaptation, state.cache
            )
            token = self.pick(params, hidden[:, 0], state.prompt_index, state.num_generated)
            num_generated = state.num_generated + state.active
            return state._replace(
                cache=cache,
                token=token,
                new_tokens=state.new_tokens.at[every_slot, state.num_generated].set(token, mode="drop"),
                num_generated=num_generated,
                active=state.active & self.continues(token, num_generated),
            )

        state = jax.lax.while_loop(unfinished, step, state._replace(cache=_first_positions(whole, extent)))
        cache = Cache(
            whole.key.at[..., :extent, :].set(state.cache.key),
            whole.value.at[..., :extent, :].set(state.cache.value),
            whole.segments.at[:, :extent].set(state.cache.segments),
            state.cache.length,
        )
        return state._replace(cache=cache), (state.new_tokens, state.num_generated, state.active)

    def pick(
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

    def continues(self, token: Int[Array, "*slots"], count: Int[Array, "*slots"] | int) -> Bool[Array, "*slots"]:
        """Whether a text with this newest token, the `count`th, goes on."""
        return ~jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32)) & (count < self.max_new_tokens)


class CompiledPrograms(NamedTuple):
    """The jitted methods of `Programs`; the state is donated."""

    init_state: Any
    prefill: Any
    decode: Any


@functools.lru_cache(maxsize=4)
def compile_programs(programs: Programs) -> CompiledPrograms:
    """The compiled functions, the same for equal settings: generations of several runs trace them once."""
    by_slot = batch_sharding(programs.mesh)
    state = State(cache_shardings(programs.decoder.config, programs.mesh), *[by_slot] * 6)  # pyright: ignore[reportArgumentType]
    on_host = replicated(programs.mesh)  # so that every process can read it
    return CompiledPrograms(
        jax.jit(programs.init_state, static_argnums=2, out_shardings=state),
        jax.jit(programs.prefill, donate_argnums=3, out_shardings=state),
        jax.jit(programs.decode, static_argnames="extent", donate_argnums=3, out_shardings=(state, (on_host,) * 3)),
    )


def _first_positions(cache: Cache, extent: int) -> Cache:
    """The first positions of every slot."""
    return cache._replace(
        key=cache.key[..., :extent, :], value=cache.value[..., :extent, :], segments=cache.segments[:, :extent]
    )


def extents(length: int) -> list[int]:
    """The parts of a cache that the decode loop is compiled for, the last of which is all of it."""
    return [e for e in (LENGTH_MULTIPLE * 2**k for k in range(length.bit_length())) if e < length] + [length]
