"""T5's position buckets, and the split of packed rows between encoder and decoder."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.models.t5.layers import distance_buckets
from sqa_jax.models.t5.split import split
from tests.support.t5_checkpoint import START, packed_row

T = 60


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (32, 100)])
def test_buckets_equal_transformers(bidirectional, buckets, max_distance, reference):
    relative = np.arange(-3 * max_distance, 3 * max_distance + 1)

    def compute():
        import torch
        from transformers.models.t5.modeling_t5 import T5Attention

        of = T5Attention._relative_position_bucket(torch.tensor(relative), bidirectional, buckets, max_distance)
        return {"buckets": of.numpy().astype(np.int8)}

    stack = "encoder" if bidirectional else "decoder"
    expected = reference(f"models/t5/buckets-{stack}-{buckets}-{max_distance}", compute)["buckets"]
    ours = distance_buckets(bidirectional, buckets, max_distance)
    np.testing.assert_array_equal(ours[np.clip(relative, -max_distance, max_distance) + max_distance], expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=5)), max_size=4),
    soft_tokens=st.integers(0, 2),
    max_decoder_tokens=st.sampled_from([None, 8]),
)
def test_split(sequences, soft_tokens, max_decoder_tokens):
    """Against a plain loop: which tokens are the decoder's, numbered from the start token; no other token depends on
    what is left out."""
    row = packed_row([([7] * size, target) for size, target in sequences], T, 20, soft_tokens)
    found = _split(row.tokens, row.positions, row.segments, max_decoder_tokens)
    decoded, numbers, last_tokens, end = np.zeros(T, bool), np.zeros(T, int), [], 0
    for size, target in sequences:
        start, end = end + soft_tokens + size, end + soft_tokens + size + 1 + len(target)
        decoded[start:end], numbers[start:end] = True, np.arange(end - start)
        last_tokens.append(end - 1)
    np.testing.assert_array_equal(found.decoded[0], decoded)
    np.testing.assert_array_equal(found.numbers[0], numbers)
    gather, scatter = np.asarray(found.gather[0]), np.asarray(found.scatter[0])
    computed = gather[gather < T].tolist()
    inner = sorted(set(np.flatnonzero(decoded).tolist()) - set(last_tokens))
    assert computed == (inner + last_tokens)[: max_decoder_tokens or T]
    assert [k for k in range(T) if scatter[k] < len(gather)] == sorted(computed)
    assert all(gather[scatter[k]] == k for k in computed)


@functools.partial(jax.jit, static_argnums=3)
def _split(tokens, positions, segments, max_decoder_tokens):
    return split(tokens, positions, segments, START, max_decoder_tokens)
