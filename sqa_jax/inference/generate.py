"""Generation: finished texts make way for new prompts, and no token waits for the host.

A batch has rows, and each row holds one text. Prompts are packed as training packs its sequences, so that reading
them wastes next to nothing, and what all of them begin with is read only once. One compiled program reads a pack and
moves its keys and values to the free rows' places in the cache. Another is a loop that continues all rows at once;
it comes back to the host when so many have ended that the next pack fits.

    packs       [p p p q q r r r r ·]  [s s s s t t t u u u]    · is padding
    rows  0     p p p 1 2 3 end → s s s s 1 2 …
          1     q q 1 2 3 4 5 6 7 8 9 …

Shapes in comments: B rows; packs of R lines (one for each data shard) of T tokens and at most M prompts; N new
tokens at most; D hidden; cache shapes as in `sqa_jax.models.layers.kv_cache`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sqa_jax import adapters
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.errors import UserError
from sqa_jax.inference.batching import cache_shardings, first_fit
from sqa_jax.inference.prefix_cache import SharedPrefixCache, with_shared_prefix
from sqa_jax.models.api import Module, extra_model_inputs, prefill, with_max_decoder_tokens
from sqa_jax.models.layers.kv_cache import Cache, init_cache
from sqa_jax.models.segments import PADDING, PREFIX_LM
from sqa_jax.parallel.mesh import batch_sharding, place_rows, replicated, row_shards
from sqa_jax.parallel.rules import shardings

_STEP = 128  # the cache's and the packed lines' lengths are multiples of this, so that few shapes are compiled
_LINE = 512  # most tokens of a packed line, where no prompt is longer
_SHORT = 32  # a line of T tokens takes at most T / _SHORT prompts


class _State(NamedTuple):
    """What the devices hold between calls.

    Attributes:
      cache: a row's keys and values; its length counts a prefix, the prompt, and the new tokens that were read.
      token: [B] newest token of each row, which is not read yet.
      out: [B, N] new tokens; those behind `written` mean nothing.
      written: [B] how many there are.
      going: [B] whether the row's text goes on.
      prompt: [B] index of the row's prompt.
      further: [B] by how much the row's pictures have taken its positions further than its number of tokens.
    """

    cache: Cache
    token: jax.Array
    out: jax.Array
    written: jax.Array
    going: jax.Array
    prompt: jax.Array
    position_offset: jax.Array


class Generator:
    """Continues prompts until an end token or a number of new tokens.

    A text depends on its prompt alone, not on what else is generated, in which order, or on how many devices (but
    for rounding). The constructor computes nothing: the mesh may be of devices that are not here.

    Args:
      settings: `config.adapter`.
      mesh: rows lie over its data axes, key/value heads over `tensor` where it divides them.
      eos_ids: tokens that end a text; they are not part of what is returned.
      max_new_tokens: longest text.
      batch: texts under way at one time; rounded up to what the mesh's data axes divide.
      temperature: 0 is greedy; else samples from softmax(logits / temperature), a pure function of
        (seed, index of the prompt, number of the token).
      pictures: what puts into rows what they see, where the student sees.
    """

    def __init__(
        self,
        settings,
        decoder: Module,
        mesh: Mesh,
        eos_ids: Sequence[int],
        max_new_tokens: int,
        batch: int,
        temperature: float = 0.0,
        seed: int = 0,
        images: ImageBatcher | None = None,
    ):
        self.images = images
        self.settings, self.decoder, self.mesh = settings, decoder, mesh
        self.eos_ids, self.max_new_tokens = tuple(eos_ids), max_new_tokens
        self.lines = row_shards(mesh)
        self.batch = -(-batch // self.lines) * self.lines
        self.temperature, self.seed = temperature, seed
        self._places = self._line = self._features = (
            0  # grow with what is asked, so that later calls of like size compile nothing
        )

        rows = batch_sharding(mesh)
        placed = _State(cache_shardings(decoder.config, mesh), rows, rows, rows, rows, rows, rows)
        # What the host looks at is on every device, and so can be read by every process.
        everywhere = replicated(mesh)
        self._beginning = SharedPrefixCache(settings, decoder, mesh)
        self._empty = jax.jit(self._make_empty, static_argnums=2, out_shardings=placed)
        self._read = jax.jit(self._read_pack, donate_argnums=3, out_shardings=placed)
        self._continue = jax.jit(
            self._continue_rows,
            static_argnames="extent",
            donate_argnums=3,
            out_shardings=(placed, (everywhere, everywhere, everywhere)),
        )

    def __call__(self, adapter: Any, base: Any, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """Yields (index into `prompts`, generated ids without the end token), as texts end.

        Raises:
          UserError: a prompt and its continuation are longer than the student's positions.
        """
        if not prompts:
            return
        longest = max(map(len, prompts)) + self.max_new_tokens
        if longest > self.decoder.config.max_positions:
            raise UserError(
                f"prompt and generation take {longest} tokens, more than the student's "
                f"{self.decoder.config.max_positions} positions; lower config.recipe.max_prompt or config.eval.max_new_tokens"
            )
        begun, beginning, prompts = self._beginning(adapter, base, prompts)
        prefix = begun + self._prefix(adapter)
        places = self._places = max(self._places, _round_up(prefix + longest - begun))
        state = self._empty(adapter, beginning, places)
        owner = np.full(self.batch, -1)  # which prompt each row holds
        used = np.zeros(self.batch, int)  # places of it that are taken
        lengths = [len(prompt) for prompt in prompts]
        T, M = self._shape_of_line(lengths)
        lines = first_fit(lengths, [1] * len(lengths), T, M)  # the longest prompts first
        packs = [lines[start : start + self.lines] for start in range(0, len(lines), self.lines)]
        for pack in [*packs, None]:
            wanted = self.batch if pack is None else sum(map(len, pack))
            while (owner < 0).sum() < wanted:
                extent = next(e for e in _extents(places) if e > used.max())
                state, report = self._continue(
                    adapter, base, beginning, state, np.int32(self.batch - wanted), extent=extent
                )
                out, written, going = map(np.asarray, report)
                for row in np.flatnonzero((owner >= 0) & ~going):
                    yield int(owner[row]), trim(out[row, : written[row]], self.eos_ids)
                    owner[row], used[row] = -1, 0
                for row in np.flatnonzero(owner >= 0):
                    used[row] = prefix + lengths[owner[row]] + written[row] - 1
            if pack is not None:
                free = iter(np.flatnonzero(owner < 0))
                rows = [[int(next(free)) for _ in line] for line in pack]
                for line, members in zip(rows, pack, strict=True):
                    owner[line], used[line] = members, [prefix + lengths[k] for k in members]
                state = self._read(adapter, base, beginning, state, self._pack(prompts, pack, rows, T, M))

    def lower_decode(self, adapter: Any, base: Any, prompt_width: int) -> jax.stages.Lowered:
        """The loop that continues all rows, from shapes alone.

        Args:
          adapter, base: trees of shapes and types.
          prompt_width: tokens of the longest prompt, virtual ones included.
        """

        def placed(tree, where):
            return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), tree, where)

        adapter, base = (placed(tree, shardings(tree, self.mesh)) for tree in (adapter, base))
        places = _round_up(self._prefix(adapter) + prompt_width + self.max_new_tokens)
        state = self._empty.eval_shape(adapter, None, places)
        most = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return self._continue.lower(adapter, base, None, state, most, extent=places)

    def _prefix(self, adapter: Any) -> int:
        return self.settings.prefix.length if "prefix" in adapter else 0

    def _shape_of_line(self, lengths: Sequence[int]) -> tuple[int, int]:
        """T and M. A pack fills about a quarter of the rows, and never more than half: the others go on meanwhile."""
        rows = self.batch // self.lines
        quarter = rows * sum(lengths) // (4 * len(lengths))
        T = self._line = max(self._line, _round_up(max(min(_LINE, quarter), *lengths)))
        return T, max(1, min(rows // 2, T // _SHORT))

    def _pack(self, prompts, pack: list[list[int]], rows: list[list[int]], T: int, M: int) -> dict[str, jax.Array]:
        """The arrays of a pack: tokens, positions, segments [R, T]; each prompt's index, row and last token [R, M].

        Args:
          pack: indices of the prompts of each line.
          rows: the row that each of them is to enter.
        """
        R = self.lines
        arrays = {name: np.zeros((R, T), np.int32) for name in ("tokens", "positions", "segments")}
        arrays |= {name: np.zeros((R, M), np.int32) for name in ("prompts", "last", "further")}
        arrays["rows"] = np.full((R, M), self.batch, np.int32)  # no row: what is written there is dropped
        for line, members in enumerate(pack):
            start = 0
            for number, index in enumerate(members):
                size = len(prompts[index])
                span = slice(start, start + size)
                arrays["tokens"][line, span] = prompts[index]
                arrays["positions"][line, span] = np.arange(size)
                arrays["segments"][line, span] = number + 1
                arrays["prompts"][line, number] = index
                arrays["last"][line, number] = span.stop - 1
                arrays["rows"][line, number] = rows[line][number]
                if self.images is not None:
                    arrays["further"][line, number] = self.images.position_offset(prompts[index])
                start = span.stop
        if self.images is not None:
            most = max(map(self.images.count, arrays["tokens"]))
            self._features = max(self._features, self.images.room(most))
            arrays["tokens"], arrays["images"] = self.images.add_images(arrays["tokens"], self._features)
        return place_rows(arrays, self.mesh, R)

    def _make_empty(self, adapter: Any, beginning: Any, places: int) -> _State:
        adaptation = with_shared_prefix(self.settings, adapter, self.decoder.config, beginning)
        cache = init_cache(
            self.decoder.config, self.batch, places - adaptation.prefix_length, adaptation, self.decoder.dtype
        )
        zeros = jnp.zeros(self.batch, jnp.int32)
        out = jnp.zeros((self.batch, self.max_new_tokens), jnp.int32)
        return _State(cache, zeros, out, zeros, zeros.astype(bool), zeros, zeros)

    def _read_pack(self, adapter: Any, base: Any, beginning: Any, state: _State, pack: dict[str, jax.Array]) -> _State:
        """Reads a pack into the rows that it names, and writes each text's first token."""
        adaptation = with_shared_prefix(self.settings, adapter, self.decoder.config, beginning)
        weights = adapters.model_params(adapter, base)
        positions, segments = pack["positions"], pack["segments"]
        decoder = with_max_decoder_tokens(self.decoder, pack["last"].shape[1])
        more = extra_model_inputs(decoder, weights, adaptation, images=pack.get("images"))
        if decoder.config.prefix_lm:
            more["branches"] = jnp.where(segments != PADDING, PREFIX_LM, 0)
        hidden, *fresh, marks = prefill(decoder, weights, pack["tokens"], positions, segments, adaptation, **more)

        # Nothing of a row's former text needs to be wiped: no token sees places behind its own.
        P = adaptation.prefix_length
        row_of = jnp.pad(pack["rows"], ((0, 0), (1, 0)), constant_values=self.batch)
        rows = jnp.take_along_axis(row_of, segments, axis=1)  # [R, T]
        key, value = (
            old.at[:, rows, :, P + positions].set(jnp.moveaxis(new, 0, 2).astype(old.dtype), mode="drop")
            for old, new in zip((state.cache.key, state.cache.value), fresh, strict=True)
        )
        places = state.cache.segments.at[rows, P + positions].set(marks, mode="drop")
        lengths = P + 1 + jnp.take_along_axis(positions, pack["last"], axis=1)
        cache = Cache(key, value, places, state.cache.length.at[pack["rows"]].set(lengths, mode="drop"))

        last = jnp.take_along_axis(hidden, pack["last"][..., None], axis=1)  # [R, M, D]
        first = self._pick(weights, last, pack["prompts"], jnp.zeros_like(pack["prompts"]))

        def enter(old, new):
            return old.at[pack["rows"]].set(new, mode="drop")

        return _State(
            cache,
            enter(state.token, first),
            state.out.at[pack["rows"], 0].set(first, mode="drop"),
            enter(state.written, 1),
            enter(state.going, self._goes_on(first, 1)),
            enter(state.prompt, pack["prompts"]),
            enter(state.position_offset, pack["further"]),
        )

    def _continue_rows(self, adapter: Any, base: Any, beginning: Any, state: _State, most: jax.Array, extent: int):
        """Continues all rows until at most `most` go on.

        Attention costs what the places that it looks at cost, so it looks at the first `extent` only: the loop also
        ends when a row has filled these, and when fewer would do.

        Returns:
          The state, and of it what the host wants to see: new tokens, their number, and which rows go on.
        """
        adaptation = with_shared_prefix(self.settings, adapter, self.decoder.config, beginning)
        weights, whole = adapters.model_params(adapter, base), state.cache
        every_row = jnp.arange(self.batch)
        least = max((e for e in _extents(whole.segments.shape[1]) if e < extent), default=0)

        def unfinished(state):
            longest = jnp.max(state.cache.length, initial=0, where=state.going)
            return (state.going.sum() > most) & (least <= longest) & (longest < extent)

        def advance(state):
            positions = (state.cache.length - adaptation.prefix_length + state.position_offset)[:, None]
            segments = state.going[:, None].astype(jnp.int32)
            hidden, cache = self.decoder.apply(
                {"params": weights}, state.token[:, None], positions, segments, adaptation, state.cache
            )
            token = self._pick(weights, hidden[:, 0], state.prompt, state.written)
            written = state.written + state.going
            return _State(
                cache,
                token,
                state.out.at[every_row, state.written].set(token, mode="drop"),
                written,
                state.going & self._goes_on(token, written),
                state.prompt,
                state.position_offset,
            )

        near = whole._replace(
            key=whole.key[..., :extent, :], value=whole.value[..., :extent, :], segments=whole.segments[:, :extent]
        )
        state = jax.lax.while_loop(unfinished, advance, state._replace(cache=near))
        cache = Cache(
            whole.key.at[..., :extent, :].set(state.cache.key),
            whole.value.at[..., :extent, :].set(state.cache.value),
            whole.segments.at[:, :extent].set(state.cache.segments),
            state.cache.length,
        )
        return state._replace(cache=cache), (state.out, state.written, state.going)

    def _pick(self, weights: Any, hidden: jax.Array, prompts: jax.Array, numbers: jax.Array) -> jax.Array:
        """The next token, int32 in the shape of `prompts`, from hidden states [..., D]."""
        logits = self.decoder.apply({"params": weights}, hidden, method="unembed")
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        @functools.partial(jnp.vectorize, signature="(v),(),()->()")
        def draw(logits, prompt, number):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), prompt), number)
            return jax.random.categorical(key, logits / self.temperature)

        return draw(logits, prompts, numbers).astype(jnp.int32)

    def _goes_on(self, token: jax.Array, written: jax.Array | int) -> jax.Array:
        """Whether a text whose newest token this is, and that has so many, goes on."""
        return ~jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32)) & (written < self.max_new_tokens)


def trim(ids: np.ndarray, eos_ids: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    ends = np.isin(ids, eos_ids)
    return ids[: int(ends.argmax())].tolist() if ends.any() else ids.tolist()


def _extents(places: int) -> list[int]:
    """The parts of a cache that the loop is compiled for, the last of which is all of it."""
    return [e for e in (_STEP * 2**k for k in range(places.bit_length())) if e < places] + [places]


def _round_up(places: int) -> int:
    return -(-places // _STEP) * _STEP
