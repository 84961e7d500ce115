"""DecodeSlots in one cache: what is read in parts, weighed and written equals reading everything anew."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax import adapters
from sqa_jax.checkpoints.weights import random_params
from sqa_jax.config import default
from sqa_jax.inference.decode_slots import DecodeSlots, _round_up
from sqa_jax.inference.generate import Generator
from sqa_jax.inference.likelihood import Choice, LikelihoodScorer
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.parallel.mesh import make_mesh

CONFIG = DecoderConfig(64, 32, 64, 2, 4, 2, 8, tie_embeddings=True, max_positions=512)
MESH = make_mesh(default().mesh, jax.devices()[:1])
PLACES, MOST = 200, 9
DECODER = Decoder(CONFIG)


@pytest.fixture(scope="module")
def base():
    """Weights so large that greedy texts do not repeat one token."""
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), random_params(CONFIG, 0))


def adapted(base, *methods):
    """Settings and a tree that changes every result."""
    config = default().adapter
    config.methods = methods
    config.lora.rank, config.prefix.length, config.prefix.reparametrize, config.prompt.length = 4, 3, False, 4
    tree = adapters.init_adapter(config, CONFIG, base, 0)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return config, jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), tree)


def ids(rng, *sizes):
    return [rng.integers(1, 64, n).tolist() for n in sizes]


class Reference:
    """The same conversation, of which every question is asked with all its tokens, in a batch of its own."""

    def __init__(self, config, tree, base, ends=(3,)):
        self.tree, self.base = tree, base
        self._score = LikelihoodScorer(config, DECODER, MESH, 256, 1)
        self._write = Generator(config, DECODER, MESH, ends, MOST, 1)

    def weigh(self, tokens, options):
        return dict(self._score(self.tree, self.base, [Choice(tokens, options)]))[0]

    def write(self, tokens):
        return dict(self._write(self.tree, self.base, [tokens]))[0]


def read_all(conversations):
    found = {}
    while conversations.waiting:
        for row, own in conversations.step():
            assert row not in found
            found[row] = own
    return found


@pytest.mark.parametrize("methods", [(), ("lora",), ("lora", "prefix", "prompt")])
def test_a_continued_cache_weighs_as_reading_anew(base, methods):
    """Three rows of other lengths, told at other times, one read in parts, options with and without a common beginning."""
    rng = np.random.default_rng(0)
    config, tree = adapted(base, *methods) if methods else (default().adapter, {})
    conversations, reference = (
        DecodeSlots(config, DECODER, MESH, 3, PLACES + 80, (3,), MOST),
        Reference(config, tree, base),
    )
    common = ids(rng, 16)[0]
    virtual = adapters.soft_prompt_tokens(config).count
    said = {row: with_soft_tokens(common + own, virtual) for row, own in enumerate(ids(rng, 5, 120, 31))}
    begun = conversations.start(tree, base, list(said.values()))
    assert conversations.begun >= 16
    pending = dict(enumerate(begun))
    for _ in range(4):
        asked = {}
        for row in pending:
            asked[row] = [*ids(rng, *rng.integers(1, 6, 3)), [7, 8, 9], [7, 8]]
            conversations.tell(row, pending[row], asked[row])
        found = read_all(conversations)
        assert set(found) == set(asked)
        for row, own in found.items():
            for ours, theirs in zip(own, reference.weigh(said[row], asked[row]), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=2e-4)
        # Not every row goes on in every round.
        pending = {row: more for row, more in enumerate(ids(rng, 3, 20, 1)) if rng.random() < 0.7}
        for row, more in pending.items():
            said[row] = said[row] + more


def test_rows_are_used_again_and_see_nothing_of_what_was_there(base):
    rng = np.random.default_rng(1)
    settings_, tree = adapted(base, "lora")
    conversations, reference = (
        DecodeSlots(settings_, DECODER, MESH, 1, PLACES, (3,), MOST),
        Reference(settings_, tree, base),
    )
    for opening in conversations.start(tree, base, ids(rng, 90, 6, 40)):
        conversations.open(0)
        options = ids(rng, 3, 4)
        conversations.tell(0, opening, options)
        (own,) = read_all(conversations).values()
        for ours, theirs in zip(own, reference.weigh(opening, options), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_written_text_is_what_generation_writes_and_is_gone_on_from(base):
    rng = np.random.default_rng(2)
    settings_, tree = adapted(base, "lora")
    conversations, reference = (
        DecodeSlots(settings_, DECODER, MESH, 3, PLACES, (3,), MOST),
        Reference(settings_, tree, base),
    )
    said = dict(enumerate(ids(rng, 30, 12, 55)))
    conversations.start(tree, base, list(said.values()))
    for row, tokens in said.items():
        conversations.tell(row, tokens[:-1])
    assert read_all(conversations) == {0: [], 1: [], 2: []}
    texts = conversations.write({row: tokens[-1] for row, tokens in said.items()})
    kept = {0: len(texts[0]), 1: min(2, len(texts[1])), 2: 0}  # all, some, none of it
    for row, text in texts.items():
        assert text == reference.write(said[row])
        conversations.keep(row, text, kept[row])
        said[row] = said[row] + text[: kept[row]] + [11, 12]
        conversations.tell(row, [11, 12], [[5, 6], [8]])
    for row, own in read_all(conversations).items():
        for ours, theirs in zip(own, reference.weigh(said[row], [[5, 6], [8]]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_rows_begin_to_write_while_others_are_writing(base):
    """With a pause, rows that have ended make way for others; every text is what it would be alone."""
    rng = np.random.default_rng(5)
    settings_, tree = adapted(base, "lora")
    ends = tuple(range(3, 15))
    conversations = DecodeSlots(settings_, DECODER, MESH, 3, PLACES, ends, MOST)
    reference = Reference(settings_, tree, base, ends)
    coming = iter(ids(rng, 30, 12, 55, 20, 9, 41, 17, 33, 8, 26))
    conversations.start(tree, base, [[1], [2]])
    said, free, done, paused = {}, {0, 1, 2}, 0, False
    while done < 10:
        begun = {row: tokens for row in free if (tokens := next(coming, None)) is not None}
        for row, tokens in begun.items():
            conversations.open(row)
            conversations.tell(row, tokens[:-1])
        read_all(conversations)
        said |= begun
        texts = conversations.write({row: tokens[-1] for row, tokens in begun.items()}, pause=2)
        assert texts
        for row, text in texts.items():
            assert text == reference.write(said[row])
        free, done, paused = set(texts), done + len(texts), paused or len(texts) < 3
    assert paused


def test_writing_stops_at_the_last_place(base):
    conversations = DecodeSlots(default().adapter, DECODER, MESH, 1, 24, (), 100)
    conversations.start({}, base, [list(range(1, 21))])
    conversations.tell(0, list(range(1, 20)))
    read_all(conversations)
    (text,) = conversations.write({0: 20}).values()
    assert len(text) == 4 and conversations.room(0) == 0  # the newest is not read yet


def test_what_does_not_fit_is_refused(base):
    conversations = DecodeSlots(default().adapter, DECODER, MESH, 1, 10, (3,), MOST)
    conversations.start({}, base, [[1, 2, 3]])
    with pytest.raises(ValueError, match="do not fit"):
        conversations.tell(0, [1] * 8, [[1, 2], [3]])
    with pytest.raises(ValueError, match="at least one token"):
        conversations.tell(0, [], [[1, 2], [3]])


@given(st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_sizes_are_rounded_up_by_little(count):
    assert count <= _round_up(count) <= 1.25 * count + 16
