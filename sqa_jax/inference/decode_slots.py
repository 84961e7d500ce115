"""DecodeSlots in one KV cache: each has a row, which is only ever continued, whatever turn it is at.

Two compiled programs do all of it. One reads what each row has to read next and, behind it, weighs continuations as
branches that leave nothing in the cache; what is long is read in parts, so that rows of all lengths share a step
(Agrawal et al. 2023, arXiv:2308.16369), and the tokens of all rows lie packed: only attention works row by row. The
other writes: it continues rows greedily, and pauses when so many have ended that others should take their places.

    row 0   q q q q q q  c c r r r r        | a a |  b b b     a question, a call and its result, two continuations
    row 1   q q q q                         | a | b b
    row 2   q q q …                                           still reading

Shapes in comments: B rows, S places of a row, T tokens read in a step, M tokens weighed, N tokens written at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sqa_jax import adapters
from sqa_jax.inference.batching import cache_shardings
from sqa_jax.inference.generate import trim
from sqa_jax.inference.likelihood import Choice, layout
from sqa_jax.inference.prefix_cache import SharedPrefixCache, with_shared_prefix
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.layers.kv_cache import Cache, PackedToCacheMap, init_cache
from sqa_jax.models.log_probs import target_log_probs
from sqa_jax.parallel.mesh import place_rows, replicated, row_shards

_WIDTHS = (16, 64, 256)  # tokens of a row that a step reads: attention works on so many of each
_WIDEST, _MOST = 256, 4096  # most of one row where not more must be in one step, and most of all rows
_EXTENT = 256  # the part of the cache that a step looks at is a multiple of this


class _Row(NamedTuple):
    """A row at the host.

    Attributes:
      length: tokens of it that are in the cache, the common beginning aside.
      tokens: to be read.
      options: to be weighed behind them; None where nothing is asked.
      text: the token that the row writes on from and what it has written, of which the newest is not read yet.
      most: tokens that it may write.
    """

    length: int = 0
    tokens: tuple[int, ...] = ()
    options: tuple[tuple[int, ...], ...] | None = None
    text: tuple[int, ...] = ()
    most: int = 0


class DecodeSlots:
    """DecodeSlots under way at one time.

    Args:
      settings: `config.adapter`.
      mesh: rows lie over its data axes, key/value heads over `tensor` where it divides them.
      rows: how many; rounded up to what the mesh's data axes divide.
      places: tokens of a conversation at most, the common beginning aside.
      ends: tokens that end what is written; they are not part of it.
      most_written: tokens written in one turn at most.
    """

    def __init__(
        self, settings, decoder: Decoder, mesh: Mesh, rows: int, places: int, ends: Sequence[int], most_written: int
    ):
        self.settings, self.mesh, self.places = settings, mesh, places
        self.decoder = decoder.clone(fused=None)
        self.ends, self.most_written = tuple(ends), most_written
        shards = row_shards(mesh)
        self.rows = -(-rows // shards) * shards
        cache, seen = cache_shardings(decoder.config, mesh), replicated(mesh)
        self._beginning = SharedPrefixCache(settings, decoder, mesh)
        self._empty = jax.jit(self._make_empty, out_shardings=cache)
        self._read = jax.jit(self._read_rows, static_argnames="extent", donate_argnums=3, out_shardings=(cache, seen))
        self._write = jax.jit(
            self._write_rows, static_argnames="extent", donate_argnums=3, out_shardings=(cache, (seen, seen, seen))
        )
        self._own = [_Row()] * self.rows

    def start(self, adapter: Any, base: Any, openings: Sequence[Sequence[int]]) -> list[list[int]]:
        """Reads what all conversations begin with, once; returns what each goes on with, to be given to `open`."""
        self.begun, beginning, rest = self._beginning(adapter, base, openings)
        self._trees = (adapter, base, beginning)
        self._cache = self._empty(adapter, beginning)
        return [list(own) for own in rest]

    def open(self, row: int) -> None:
        """Empties a row for a new conversation."""
        self._own[row] = _Row()

    def tell(self, row: int, tokens: Sequence[int], options: Sequence[Sequence[int]] = ()) -> None:
        """Gives a row tokens to read, and continuations to weigh behind them.

        Raises:
          ValueError: there is nothing to read, or no room for it and the continuations.
        """
        own = self._own[row]
        if not own.tokens and not tokens:
            raise ValueError("a row is weighed behind at least one token")
        if self.room(row) < len(tokens) + sum(map(len, options)):
            raise ValueError(f"{len(tokens)} tokens and their continuations do not fit into the row's {self.room(row)}")
        self._own[row] = own._replace(tokens=own.tokens + tuple(tokens), options=tuple(map(tuple, options)))

    def room(self, row: int) -> int:
        """Tokens that still fit into a row, those that it is to read aside."""
        return self.places - self._own[row].length - len(self._own[row].tokens)

    @property
    def waiting(self) -> bool:
        """Whether a row has something to read."""
        return any(own.options is not None for own in self._own)

    def step(self) -> list[tuple[int, list[np.ndarray]]]:
        """Reads for one step.

        Returns:
          Of each row that has now read everything: (row, log-probabilities of each continuation's own tokens; what
          all of them begin with is left out).
        """
        asked, trees = self._next()
        sizes = {row: len(tree.tokens) for row, tree in trees.items()}
        # The hidden state of the last token weighs the first ones behind it: both are in one step.
        width = max([_WIDEST] + [sizes[row] - len(own.tokens) + 1 for row, own in asked.items()])
        done = [row for row in asked if sizes[row] <= width]
        parts = {}
        for row, own in asked.items():
            read, options = (len(own.tokens), None) if row in done else (min(width, len(own.tokens) - 1), own.options)
            parts[row] = trees[row] if row in done else layout(Choice(own.tokens[:read], ()))
            self._own[row] = _Row(own.length + read, own.tokens[read:], options)
        batch, scored = self._packed(parts, {row: own.length for row, own in asked.items()})
        self._cache, log_probs = self._read(*self._trees, self._cache, batch, extent=self._extent_of(asked, parts))
        log_probs = np.asarray(log_probs) if done else None
        found = {row: log_probs[scored[row]] for row in done}
        return [(row, [found[row][trees[row].option == k] for k in range(len(asked[row].options))]) for row in done]

    def _next(self) -> tuple[dict[int, _Row], dict[int, Any]]:
        """The rows that read in the next step, as many as it takes, and what each has to read."""
        asked, trees, total = {}, {}, 0
        for row, own in enumerate(self._own):
            if own.options is not None:
                tree = layout(Choice(own.tokens, own.options))
                total += min(len(tree.tokens), _WIDEST)
                if asked and total > _MOST:
                    break
                asked[row], trees[row] = own, tree
        return asked, trees

    def _extent_of(self, asked: Mapping[int, _Row], parts: Mapping[int, Any]) -> int:
        longest = max(own.length + len(parts[row].tokens) for row, own in asked.items())
        return _extent(longest, self.places)

    def _packed(self, parts: Mapping[int, Any], lengths: Mapping[int, int]) -> tuple[dict[str, Any], dict[int, Any]]:
        """The arrays of a step, and where in its log-probabilities those of each row are.

        Tokens lie packed in lines, a line for each data shard; the grid says to which row each belongs.
        """
        lines = row_shards(self.mesh)
        line_of = {row: row * lines // self.rows for row in parts}
        counts, targets = np.zeros(lines, int), np.zeros(lines, int)
        for row, part in parts.items():
            counts[line_of[row]] += len(part.tokens)
            targets[line_of[row]] += len(part.targets)
        N, M = _round_up(int(counts.max())), _round_up(max(1, int(targets.max())))
        A = min(self.rows, 1 << (len(parts) - 1).bit_length())
        W = next(w for w in (*_WIDTHS, *range(2 * _WIDEST, 10**6, _WIDEST)) if w >= max(len(p.tokens) for p in parts.values()))  # fmt: skip
        batch = {name: np.zeros((lines, N), np.int32) for name in ("tokens", "positions", "segments", "branches")}
        batch |= {name: np.zeros((lines, M), np.int32) for name in ("predicting", "targets")}
        rows, places = np.full(A, self.rows, np.int32), np.full((A, W), lines * N, np.int32)
        back = np.full(lines * N, A * W, np.int32)
        length, scored = np.zeros(self.rows, np.int32), {}
        starts, weighed = np.zeros(lines, int), np.zeros(lines, int)
        for place, (row, part) in enumerate(parts.items()):
            line = line_of[row]
            start, first = int(starts[line]), int(weighed[line])
            here, own = slice(start, start + len(part.tokens)), slice(first, first + len(part.targets))
            batch["tokens"][line, here], batch["positions"][line, here] = part.tokens, lengths[row] + part.positions
            batch["segments"][line, here], batch["branches"][line, here] = 1, part.branches
            batch["predicting"][line, own], batch["targets"][line, own] = start + part.predicting, part.targets
            rows[place], length[row], scored[row] = row, lengths[row], (line, own)
            where = line * N + np.arange(here.start, here.stop)
            places[place, : len(where)], back[where] = where, place * W + np.arange(len(where))
            starts[line], weighed[line] = here.stop, own.stop
        placed = place_rows(batch, self.mesh, lines)
        return {**placed, "grid": PackedToCacheMap(rows, places, back), "length": length}, scored

    def write(self, begun: Mapping[int, int], pause: int = 0) -> dict[int, list[int]]:
        """Continues rows greedily, each until an end token, `most_written` tokens, or its last place.

        Args:
          begun: of each row that begins to write, the token that it goes on from, which is read first. There must be
            room for it and one more.
          pause: returns as soon as no more than so many go on; a later call continues these, too.

        Returns:
          Of each row that has ended what it wrote, without an end token. All of it is in the row; `keep` takes some
          back.
        """
        for row, first in begun.items():
            self._own[row] = self._own[row]._replace(text=(first,), most=min(self.most_written, self.room(row) - 1))
        token, most = np.zeros(self.rows, np.int32), np.zeros(self.rows, np.int32)
        under_way = {row: own for row, own in enumerate(self._own) if own.text}
        for row, own in under_way.items():
            token[row], most[row] = own.text[-1], own.most - (len(own.text) - 1)
        length = np.asarray([own.length for own in self._own], np.int32)
        extent = _extent(int((length + most).max()), self.places)
        placed = place_rows({"token": token, "most": most, "length": length}, self.mesh, self.rows)
        pause = np.int32(min(pause, len(under_way) - 1))
        self._cache, report = self._write(*self._trees, self._cache, placed, pause, extent=extent)
        out, written, going = map(np.asarray, report)
        texts = {}
        for row, own in under_way.items():
            text = own.text + tuple(out[row, : written[row]].tolist())
            now = own.length + int(written[row])
            if going[row]:
                self._own[row] = own._replace(length=now, text=text)
            else:
                texts[row] = ids = trim(np.asarray(text[1:]), self.ends)
                self._own[row] = _Row(now, tuple(ids[len(text) - 2 :]))  # the newest token is not read yet
        return texts

    def keep(self, row: int, ids: Sequence[int], count: int) -> None:
        """Of what a row has just written, takes all but the first `count` tokens back."""
        own = self._own[row]
        excess = len(ids) - count
        unread = len(own.tokens)
        self._own[row] = _Row(own.length - max(0, excess - unread), own.tokens[: max(0, unread - excess)])

    def _make_empty(self, adapter: Any, beginning: Any) -> Cache:
        adaptation = with_shared_prefix(self.settings, adapter, self.decoder.config, beginning)
        return init_cache(self.decoder.config, self.rows, self.places, adaptation, self.decoder.dtype)

    def _read_rows(self, adapter, base, beginning, cache: Cache, batch: dict[str, jax.Array], extent: int):
        """The cache with what was read in it, and log-probabilities [B, M]."""
        adaptation = with_shared_prefix(self.settings, adapter, self.decoder.config, beginning)
        weights = adapters.model_params(adapter, base)
        P = adaptation.prefix_length
        cache = cache._replace(length=P + batch["length"])
        packed = (batch[name] for name in ("tokens", "positions", "segments"))
        hidden, cache = self.decoder.apply(
            {"params": weights}, *packed, adaptation, cache, batch["branches"], extent=P + extent, grid=batch["grid"]
        )
        return cache, target_log_probs(self.decoder, weights, hidden, batch["predicting"], batch["targets"])

    def _write_rows(self, adapter, base, beginning, cache: Cache, batch: dict[str, jax.Array], pause, extent: int):
        """The cache, new tokens [B, N], how many of them each row has written, and which go on, [B]."""
        adaptation = with_shared_prefix(self.settings, adapter, self.decoder.config, beginning)
        weights = adapters.model_params(adapter, base)
        P, B = adaptation.prefix_length, self.rows

        def unfinished(state):
            return state[-1].sum() > pause

        def advance(state):
            cache, token, out, written, going = state
            positions, segments = (cache.length - P)[:, None], going[:, None].astype(jnp.int32)
            hidden, cache = self.decoder.apply(
                {"params": weights}, token[:, None], positions, segments, adaptation, cache, extent=P + extent
            )
            logits = self.decoder.apply({"params": weights}, hidden[:, 0], method="unembed")
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            out = out.at[jnp.arange(B), jnp.where(going, written, out.shape[1])].set(token, mode="drop")
            written += going
            going &= ~jnp.isin(token, jnp.asarray(self.ends, jnp.int32)) & (written < batch["most"])
            return cache, token, out, written, going

        out = jnp.zeros((B, self.most_written), jnp.int32)
        start = (cache._replace(length=P + batch["length"]), batch["token"], out, jnp.zeros(B, jnp.int32), batch["most"] > 0)  # fmt: skip
        cache, _, out, written, going = jax.lax.while_loop(unfinished, advance, start)
        return cache, (out, written, going)


def _round_up(count: int) -> int:
    """A little more, so that few sizes are compiled: an eighth on average."""
    step = max(16, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def _extent(places: int, most: int) -> int:
    """The part of the cache that a step looks at, of few sizes that are compiled for."""
    return min(-(-places // _EXTENT) * _EXTENT, most)
