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

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import FrozenConfigDict

from sqa_jax.batches.images import ImageBatcher
from sqa_jax.errors import UserError
from sqa_jax.inference.batching import first_fit, round_up
from sqa_jax.inference.generate_programs import LENGTH_MULTIPLE, Pack, Programs, compile_programs, extents
from sqa_jax.inference.prefix_cache import SharedPrefixCache
from sqa_jax.models.api import StudentModel
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.parallel.mesh import place_rows, replicated, row_shards
from sqa_jax.parallel.rules import shardings

_MAX_ROW_LENGTH = 512  # tokens of a packed row at most, where no prompt is longer
_TOKENS_PER_PROMPT = 32  # a packed row of T tokens takes at most T / _TOKENS_PER_PROMPT prompts


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
        # Sizes only grow, so that later calls with prompts of like sizes compile nothing.
        self._cache_length = self._row_length = self._features = 0

        self._shared_prefix_cache = SharedPrefixCache(adapter_config, decoder, mesh)
        sampling = (temperature, seed) if temperature else (0.0, 0)  # greedy decoding has no seed
        frozen = FrozenConfigDict(adapter_config)
        self._compiled = compile_programs(
            Programs(frozen, decoder, mesh, self.eos_ids, max_new_tokens, self.num_slots, *sampling)
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
        length = round_up(prefix + longest - shared.length, LENGTH_MULTIPLE)
        length = self._cache_length = max(self._cache_length, length)
        state = self._compiled.init_state(adapter, shared.kv, length)
        prompt_of = np.full(self.num_slots, -1)  # index of each slot's prompt; -1 is free
        used = np.zeros(self.num_slots, int)  # positions of its cache that are taken
        T, M, packs = self._plan(prompts)
        for pack in [*packs, None]:
            wanted = self.num_slots if pack is None else sum(map(len, pack))
            while (prompt_of < 0).sum() < wanted:
                extent = next(e for e in extents(length) if e > used.max())
                state, outputs = self._compiled.decode(*params, state, np.int32(self.num_slots - wanted), extent=extent)
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
                state = self._compiled.prefill(*params, state, self._pack(prompts, pack, slots, T, M))

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
        length = round_up(self._prefix_length(adapter) + prompt_length + self.max_new_tokens, LENGTH_MULTIPLE)
        state = self._compiled.init_state.eval_shape(adapter, None, length)
        max_active = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return self._compiled.decode.lower(adapter, base, None, state, max_active, extent=length)

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
        T = self._row_length = max(self._row_length, round_up(longest, LENGTH_MULTIPLE))
        M = max(1, min(slots // 2, T // _TOKENS_PER_PROMPT))
        rows = first_fit(lengths, [1] * len(lengths), T, M)
        return T, M, [rows[start : start + self.packed_rows] for start in range(0, len(rows), self.packed_rows)]

    def _pack(self, prompts, rows: list[list[int]], slots: list[list[int]], T: int, M: int) -> Pack:
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
        return Pack(*place_rows(arrays, self.mesh, R))


def trim(ids: Int[np.ndarray, "n"], eos_ids: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    ends = np.isin(ids, eos_ids)
    return ids[: int(ends.argmax())].tolist() if ends.any() else ids.tolist()
