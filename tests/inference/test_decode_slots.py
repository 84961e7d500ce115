"""Multi-turn decoding in one KV cache: chunked prefill, scoring and generation equal recomputing everything."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax import adapters
from sqa_jax.checkpoints.weights import random_params
from sqa_jax.config import default
from sqa_jax.inference.decode_slots import DecodeSlots, padded_size
from sqa_jax.inference.generate import Generator
from sqa_jax.inference.likelihood import LikelihoodScorer, MultipleChoice
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.parallel.mesh import make_mesh

CONFIG = DecoderConfig(64, 32, 64, 2, 4, 2, 8, tie_embeddings=True, max_positions=512)
MESH = make_mesh(default().mesh, jax.devices()[:1])
MAX_TOKENS, MAX_NEW = 200, 9
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
    """The same dialogue, recomputed from all of its tokens for every request."""

    def __init__(self, config, tree, base, ends=(3,)):
        self.tree, self.base = tree, base
        self._score = LikelihoodScorer(config, DECODER, MESH, 256, 1)
        self._generate = Generator(config, DECODER, MESH, ends, MAX_NEW, 1)

    def score(self, tokens, options):
        return dict(self._score(self.tree, self.base, [MultipleChoice(tokens, options)]))[0]

    def generate(self, tokens):
        return dict(self._generate(self.tree, self.base, [tokens]))[0]


@pytest.fixture(scope="module")
def with_lora(base):
    """(tree, three slots, reference) that tests share, since most time goes into compiling."""
    config, tree = adapted(base, "lora")
    return tree, DecodeSlots(config, DECODER, MESH, 3, MAX_TOKENS, (3,), MAX_NEW), Reference(config, tree, base)


def prefill_all(slots):
    found = {}
    while slots.pending:
        for slot, log_probs in slots.prefill_step():
            assert slot not in found
            found[slot] = log_probs
    return found


@pytest.mark.parametrize("methods", [(), ("lora", "prefix", "prompt")])  # LoRA alone: the tests below
def test_scores_after_several_turns_equal_recomputing(base, methods):
    """Three slots of different lengths and turns, one prefilled in chunks, options with and without a common prefix."""
    rng = np.random.default_rng(0)
    config, tree = adapted(base, *methods) if methods else (default().adapter, {})
    slots, reference = (
        DecodeSlots(config, DECODER, MESH, 3, MAX_TOKENS + 80, (3,), MAX_NEW),
        Reference(config, tree, base),
    )
    common = ids(rng, 16)[0]
    soft = adapters.soft_prompt_tokens(config).count
    said = {slot: with_soft_tokens(common + rest, soft) for slot, rest in enumerate(ids(rng, 5, 120, 31))}
    prompts = slots.start(tree, base, list(said.values()))
    assert slots.shared_prefix_length >= 16
    pending = dict(enumerate(prompts))
    for _ in range(4):
        asked = {}
        for slot in pending:
            asked[slot] = [*ids(rng, *rng.integers(1, 6, 3)), [7, 8, 9], [7, 8]]
            slots.enqueue(slot, pending[slot], asked[slot])
        found = prefill_all(slots)
        assert set(found) == set(asked)
        for slot, log_probs in found.items():
            for ours, theirs in zip(log_probs, reference.score(said[slot], asked[slot]), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=2e-4)
        # Not every slot has a further turn in every round.
        pending = {slot: more for slot, more in enumerate(ids(rng, 3, 20, 1)) if rng.random() < 0.7}
        for slot, more in pending.items():
            said[slot] = said[slot] + more


def test_a_reset_slot_attends_to_nothing_of_the_dialogue_before(base, with_lora):
    rng, (tree, slots, reference) = np.random.default_rng(1), with_lora
    for opening in slots.start(tree, base, ids(rng, 90, 6, 40)):
        slots.reset(0)
        options = ids(rng, 3, 4)
        slots.enqueue(0, opening, options)
        (log_probs,) = prefill_all(slots).values()
        for ours, theirs in zip(log_probs, reference.score(opening, options), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_decoded_text_equals_generation_and_can_be_continued(base, with_lora):
    rng, (tree, slots, reference) = np.random.default_rng(2), with_lora
    said = dict(enumerate(ids(rng, 30, 12, 55)))
    slots.start(tree, base, list(said.values()))
    for slot, tokens in said.items():
        slots.enqueue(slot, tokens[:-1])
    assert prefill_all(slots) == {0: [], 1: [], 2: []}
    texts = slots.decode({slot: tokens[-1] for slot, tokens in said.items()})
    kept = {0: len(texts[0]), 1: min(2, len(texts[1])), 2: 0}  # all, some, none of it
    for slot, text in texts.items():
        assert text == reference.generate(said[slot])
        slots.truncate(slot, text, kept[slot])
        said[slot] = said[slot] + text[: kept[slot]] + [11, 12]
        slots.enqueue(slot, [11, 12], [[5, 6], [8]])
    for slot, log_probs in prefill_all(slots).items():
        for ours, theirs in zip(log_probs, reference.score(said[slot], [[5, 6], [8]]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_slots_start_to_decode_while_others_are_decoding(base):
    """With a pause, slots that have ended are refilled; every text is what it would be alone."""
    rng = np.random.default_rng(5)
    settings_, tree = adapted(base, "lora")
    ends = tuple(range(3, 15))
    slots = DecodeSlots(settings_, DECODER, MESH, 3, MAX_TOKENS, ends, MAX_NEW)
    reference = Reference(settings_, tree, base, ends)
    coming = iter(ids(rng, 30, 12, 55, 20, 9, 41, 17, 33, 8, 26))
    slots.start(tree, base, [[1], [2]])
    said, free, done, paused = {}, {0, 1, 2}, 0, False
    while done < 10:
        started = {slot: tokens for slot in free if (tokens := next(coming, None)) is not None}
        for slot, tokens in started.items():
            slots.reset(slot)
            slots.enqueue(slot, tokens[:-1])
        prefill_all(slots)
        said |= started
        texts = slots.decode({slot: tokens[-1] for slot, tokens in started.items()}, pause_at=2)
        assert texts
        for slot, text in texts.items():
            assert text == reference.generate(said[slot])
        free, done, paused = set(texts), done + len(texts), paused or len(texts) < 3
    assert paused


def test_decoding_stops_at_the_last_position(base):
    slots = DecodeSlots(default().adapter, DECODER, MESH, 1, 24, (), 100)
    slots.start({}, base, [list(range(1, 21))])
    slots.enqueue(0, list(range(1, 20)))
    prefill_all(slots)
    (text,) = slots.decode({0: 20}).values()
    assert len(text) == 4 and slots.remaining_tokens(0) == 0  # the newest is not in the cache yet


def test_input_that_does_not_fit_is_refused(base):
    slots = DecodeSlots(default().adapter, DECODER, MESH, 1, 10, (3,), MAX_NEW)
    slots.start({}, base, [[1, 2, 3]])
    with pytest.raises(ValueError, match="do not fit"):
        slots.enqueue(0, [1] * 8, [[1, 2], [3]])
    with pytest.raises(ValueError, match="at least one prefilled token"):
        slots.enqueue(0, [], [[1, 2], [3]])


@given(st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_sizes_are_rounded_up_by_little(count):
    assert count <= padded_size(count) <= 1.25 * count + 16
