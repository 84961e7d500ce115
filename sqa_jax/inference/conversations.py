"""Conversations in one KV cache: each has a row, which is only ever continued, whatever turn it is at.

Two compiled programs do all of it. One reads what each row has to read next and, behind it, weighs continuations as
branches that leave nothing in the cache; what is long is read in parts, so that rows of all lengths share a step
(Agrawal et al. 2023, arXiv:2308.16369). The other writes: it continues rows greedily until each has ended.

    row 0   q q q q q q  c c r r r r        | a a |  b b b     a question, a call and its result, two continuations
    row 1   q q q q                         | a | b b
    row 2   q q q …                                           still reading

Shapes in comments: B rows, S places of a row, T tokens read in a step, M tokens weighed, N tokens written at most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sqa_jax.adapters import adapter as adapters
from sqa_jax.inference.beginning import Beginning, adapt, common_length
from sqa_jax.inference.generate import trim
from sqa_jax.inference.likelihood import Choice, layout
from sqa_jax.parallel.mesh import BATCH, batch_sharding, place_rows, replicated, row_shards
from sqa_jax.students.decoder import Cache, Decoder, init_cache
from sqa_jax.training.loss import target_log_probs

_WIDTHS = (16, 32, 64, 128, 256)  # tokens of a row that a step may read
_EXTENT = 256  # the part of the cache that a step looks at is a multiple of this
_OVERHEAD = 256  # what a step costs besides its tokens, in tokens: the weights must be read


class _Row(NamedTuple):
    """A row at the host.

    Attributes:
      length: tokens of it that are in the cache, the common beginning aside.
      tokens: to be read.
      options: to be weighed behind them; None where nothing is asked.
    """

    length: int = 0
    tokens: tuple[int, ...] = ()
    options: tuple[tuple[int, ...], ...] | None = None


class Conversations:
    """Conversations under way at one time.

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
        by_row, seen = batch_sharding(mesh), replicated(mesh)
        heads = "tensor" if decoder.config.num_kv_heads % mesh.shape["tensor"] == 0 else None
        keys = NamedSharding(mesh, PartitionSpec(None, BATCH, heads))
        cache = Cache(keys, keys, by_row, by_row)
        self._beginning = Beginning(settings, decoder, mesh)
        self._empty = jax.jit(self._make_empty, out_shardings=cache)
        self._read = jax.jit(self._read_rows, static_argnames="extent", donate_argnums=3, out_shardings=(cache, seen))
        self._write = jax.jit(
            self._write_rows, static_argnames="extent", donate_argnums=3, out_shardings=(cache, (seen, seen))
        )
        self._weighed = 0  # grows with what is asked, so that later steps of like size compile nothing
        self._own = [_Row()] * self.rows

    def start(self, adapter: Any, base: Any, openings: Sequence[Sequence[int]]) -> list[list[int]]:
        """Reads what all conversations begin with, once; returns what each goes on with, to be given to `open`."""
        virtual = adapters.virtual_tokens(self.settings) if "prompt" in adapter else 0
        openings = [[0] * virtual + list(opening) for opening in openings]
        self.begun = common_length(openings, virtual)
        beginning = self._beginning(adapter, base, openings[0][: self.begun]) if self.begun else None
        self._trees = (adapter, base, beginning)
        self._cache = self._empty(adapter, beginning)
        return [opening[self.begun :] for opening in openings]

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
        asked = {row: own for row, own in enumerate(self._own) if own.options is not None}
        trees = {row: layout(Choice(own.tokens, own.options), 0) for row, own in asked.items()}
        sizes = {row: len(tree.tokens) for row, tree in trees.items()}
        # The hidden state of the last token weighs the first ones behind it: both are in one step.
        width = _width(sizes.values(), max(sizes[row] - len(own.tokens) + 1 for row, own in asked.items()), self.rows)
        done = [row for row in asked if sizes[row] <= width]
        weighed = max([1, self._weighed] + [len(trees[row].targets) for row in done])
        self._weighed = -(-weighed // 16) * 16
        batch = {name: np.zeros((self.rows, width), np.int32) for name in ("tokens", "positions", "segments", "branches")}  # fmt: skip
        batch |= {name: np.zeros((self.rows, self._weighed), np.int32) for name in ("predicting", "targets")}
        batch["length"] = np.asarray([own.length for own in self._own], np.int32)
        for row, own in asked.items():
            if row in done:
                tree, read, options = trees[row], len(own.tokens), None
            else:
                read, options = min(width, len(own.tokens) - 1), own.options
                tree = layout(Choice(own.tokens[:read], ()), 0)
            here, scored = slice(0, len(tree.tokens)), slice(0, len(tree.targets))
            batch["tokens"][row, here], batch["positions"][row, here] = tree.tokens, own.length + tree.positions
            batch["segments"][row, here], batch["branches"][row, here] = 1, tree.branches
            batch["predicting"][row, scored], batch["targets"][row, scored] = tree.predicting, tree.targets
            self._own[row] = _Row(own.length + read, own.tokens[read:], options)
        extent = _extent(max(own.length for own in asked.values()) + width, self.places)
        placed = place_rows(batch, self.mesh, self.rows)
        self._cache, log_probs = self._read(*self._trees, self._cache, placed, extent=extent)
        log_probs = np.asarray(log_probs) if done else None
        return [
            (row, [log_probs[row, : len(trees[row].targets)][trees[row].option == k] for k in range(len(asked[row].options))])
            for row in done
        ]  # fmt: skip

    def write(self, begun: Mapping[int, int]) -> dict[int, list[int]]:
        """Continues rows greedily, each until an end token, `most_written` tokens, or its last place.

        Args:
          begun: of each row the token that it goes on from, which is read first. There must be room for it and one more.

        Returns:
          Of each row what it wrote, without an end token. All of it is in the row; `keep` takes some back.
        """
        token, most = np.zeros(self.rows, np.int32), np.zeros(self.rows, np.int32)
        for row, first in begun.items():
            token[row], most[row] = first, min(self.most_written, self.room(row) - 1)
        length = np.asarray([own.length for own in self._own], np.int32)
        extent = _extent(int((length + most).max()), self.places)
        placed = place_rows({"token": token, "most": most, "length": length}, self.mesh, self.rows)
        self._cache, report = self._write(*self._trees, self._cache, placed, extent=extent)
        out, written = map(np.asarray, report)
        texts = {}
        for row in begun:
            ids = trim(out[row, : written[row]], self.ends)
            # The newest token is not read yet, be it an end token or not.
            read = min(len(ids), int(written[row]) - 1)
            texts[row] = ids
            self._own[row] = _Row(int(length[row]) + 1 + read, tuple(ids[read:]))
        return texts

    def keep(self, row: int, ids: Sequence[int], count: int) -> None:
        """Of what a row has just written, takes all but the first `count` tokens back."""
        own = self._own[row]
        excess = len(ids) - count
        unread = len(own.tokens)
        self._own[row] = _Row(own.length - max(0, excess - unread), own.tokens[: max(0, unread - excess)])

    def _make_empty(self, adapter: Any, beginning: Any) -> Cache:
        adaptation = adapt(self.settings, adapter, self.decoder.config, beginning)
        return init_cache(self.decoder.config, self.rows, self.places, adaptation, self.decoder.dtype)

    def _read_rows(self, adapter, base, beginning, cache: Cache, batch: dict[str, jax.Array], extent: int):
        """The cache with what was read in it, and log-probabilities [B, M]."""
        adaptation = adapt(self.settings, adapter, self.decoder.config, beginning)
        weights = adapters.weights(adapter, base)
        P = adaptation.prefix_length
        cache = cache._replace(length=P + batch["length"])
        rows = (batch[name] for name in ("tokens", "positions", "segments"))
        hidden, cache = self.decoder.apply(
            {"params": weights}, *rows, adaptation, cache, batch["branches"], extent=P + extent
        )
        return cache, target_log_probs(self.decoder, weights, hidden, batch["predicting"], batch["targets"])

    def _write_rows(self, adapter, base, beginning, cache: Cache, batch: dict[str, jax.Array], extent: int):
        """The cache, new tokens [B, N], and how many of them each row has written, [B]."""
        adaptation = adapt(self.settings, adapter, self.decoder.config, beginning)
        weights = adapters.weights(adapter, base)
        P, B = adaptation.prefix_length, self.rows

        def unfinished(state):
            return state[-1].any()

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
        cache, _, out, written, _ = jax.lax.while_loop(unfinished, advance, start)
        return cache, (out, written)


def _width(sizes: Collection[int], least: int, rows: int) -> int:
    """Tokens a row to read in a step: those that are of most use for what the step costs."""
    widths = [width for width in _WIDTHS if width >= least] or [-(-least // _WIDTHS[-1]) * _WIDTHS[-1]]
    return max(widths, key=lambda width: sum(min(size, width) for size in sizes) / (rows * width + _OVERHEAD))


def _extent(places: int, most: int) -> int:
    """The part of the cache that a step looks at, of few sizes that are compiled for."""
    return min(-(-places // _EXTENT) * _EXTENT, most)
