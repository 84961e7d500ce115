"""Packing and loading: each sequence once per epoch, masks on targets, order a function of seed and step."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.batches.loader import PackedRows, make_loader
from sqa_jax.batches.packing import Limits, choose_limits, pack_row
from sqa_jax.errors import UserError
from sqa_jax.models.soft_tokens import with_soft_tokens


def make(seed, count, longest=60, soft_tokens=0, row=128, data_seed=0):
    rng = np.random.default_rng(data_seed)
    prompts, targets = rng.integers(1, longest // 2, count), rng.integers(1, longest // 2, count)
    tokens = [rng.integers(1, 1000, p + t).astype(np.int32) for p, t in zip(prompts, targets, strict=True)]
    pids = [str(k) for k in range(count)]
    tokens, prompts = [np.asarray(with_soft_tokens(ids, soft_tokens)) for ids in tokens], prompts + soft_tokens
    limits = choose_limits(prompts + targets, targets, row, pids)
    return PackedRows(tokens, prompts, pids, limits, 0, seed)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, 120), soft_tokens=st.sampled_from([0, 5]))
def test_each_epoch_has_each_sequence_once_with_its_targets(seed, count, soft_tokens):
    rows = make(seed, count, soft_tokens=soft_tokens, data_seed=seed)
    start = 0
    for epoch in range(2):
        stop = start + rows.rows_of_epoch(epoch)
        members = sorted(k for row in range(start, stop) for k in rows.members(row))
        assert members == list(range(count))
        for number in range(start, stop):
            row = rows[number]
            for segment, k in enumerate(rows.members(number), start=1):
                members = row.segments == segment
                np.testing.assert_array_equal(row.tokens[members], rows.tokens[k])
                assert rows.tokens[k][:soft_tokens].tolist() == [-1, -2, -3, -4, -5][:soft_tokens]
                np.testing.assert_array_equal(row.positions[members], np.arange(members.sum()))
            # The targets under the mask are the tokens that follow each target position.
            used = row.target_mask == 1
            np.testing.assert_array_equal(row.tokens[row.target_positions[used] + 1], row.targets[used])
            expected = np.concatenate([rows.tokens[k][rows.prompt_lengths[k] :] for k in rows.members(number)])
            np.testing.assert_array_equal(row.targets[used], expected)
            np.testing.assert_array_equal(
                row.segments[row.target_positions[used]], row.segments[row.target_positions[used] + 1]
            )
        start = stop


def test_example_of_the_docstring():
    row = pack_row([np.array([7, 8, 9]), np.array([1, 2, 3, 4])], [1, 2], Limits(8, 4), 0)
    assert row.tokens.tolist() == [7, 8, 9, 1, 2, 3, 4, 0]
    assert row.segments.tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert row.target_positions.tolist() == [0, 1, 4, 5]
    assert row.targets.tolist() == [8, 9, 3, 4]


def test_packing_efficiency():
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(4.4, 0.4, 3000), 20, 400).astype(int)  # about the lengths of ScienceQA's prompts
    targets = np.clip(rng.lognormal(2.5, 0.5, 3000), 5, 100).astype(int)
    limits = choose_limits(prompts + targets, targets, 1024, [""] * 3000)
    rows = PackedRows([np.zeros(n, np.int32) for n in prompts + targets], prompts, [""] * 3000, limits, 0, 0)
    assert rows.packing_efficiency() > 0.97


def test_order_depends_on_seed_and_epoch_only():
    a, b, other = make(3, 50), make(3, 50), make(4, 50)
    order = [a.members(k) for k in range(60)]
    assert order == [b.members(k) for k in reversed(range(60))][::-1], "random access must not depend on earlier calls"
    assert order != [other.members(k) for k in range(60)]
    n = a.rows_of_epoch(0)
    assert order[:n] != order[n : 2 * n]


def test_loader_resumes_from_its_state():
    rows = make(0, 80)
    loader = make_loader(rows, 2, 3)
    batches = [next(loader) for _ in range(9)]
    assert batches[0].tokens.shape == (3, 2, 128)
    again = make_loader(make(0, 80), 2, 3)
    for _ in range(4):
        next(again)
    state = again.get_state()
    resumed = make_loader(make(0, 80), 2, 3)
    resumed.set_state(state)
    for expected in batches[4:]:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), expected)


def test_each_process_loads_its_rows_of_a_step():
    """Whichever rows they are; and the state of one process continues in two."""
    loader = make_loader(make(0, 80), 4, 2)
    next(loader)
    state = loader.get_state()
    whole = next(loader)
    for local in ([0, 3], [1, 2], [0, 1, 2, 3]):
        part = make_loader(make(0, 80), 4, 2, np.array(local))
        part.set_state(state)
        np.testing.assert_array_equal(next(part).tokens, whole.tokens[:, local])


def test_a_question_longer_than_a_row_is_named():
    with pytest.raises(UserError, match="question b takes 70 tokens.*config.train.row_length = 64"):
        choose_limits(np.array([10, 70]), np.array([2, 2]), 64, ["a", "b"])
