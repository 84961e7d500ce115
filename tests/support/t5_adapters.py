"""Adapters of tiny T5s with random parameters from NumPy, and scoring and generation with them."""

from __future__ import annotations

import jax
import numpy as np

from sqa_jax import adapters
from sqa_jax.config import default
from sqa_jax.inference.generate import Generator, trim
from sqa_jax.inference.likelihood import LikelihoodScorer, MultipleChoice
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.parallel.mesh import make_mesh
from tests.support.t5_checkpoint import MAX_NEW_TOKENS, NEVER, OPTIONS, PROMPTS, Checkpoint


def adapter_settings(*methods: str):
    """`config.adapter` of a small adapter."""
    config = default().adapter
    config.methods = methods
    config.lora.rank, config.lora.alpha = 4, 4.0
    config.prefix.length, config.prefix.reparametrize, config.prompt.length = 3, False, 5
    return config


def random_tree(settings, config, params, spread: float = 0.2):
    """An adapter's tree of which every parameter is random."""
    shapes = jax.eval_shape(lambda base: adapters.init_adapter(settings, config, base, 0), params)
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: rng.normal(0, spread, leaf.shape).astype(np.float32), shapes)


def assert_scores_and_texts(expected, checkpoint: Checkpoint, settings, tree) -> None:
    """Likelihoods of options that are branches of packed rows, and texts from a cache whose slots are refilled.

    Args:
      expected: `torch_results`.
    """
    model, params, mesh = checkpoint.model, checkpoint.params, make_mesh(default().mesh, jax.devices()[:1])
    soft_tokens = adapters.soft_prompt_tokens(settings).count if "prompt" in tree else 0
    prompts = [with_soft_tokens(prompt, soft_tokens) for prompt in PROMPTS]
    choices = [MultipleChoice(prompt, options) for prompt, options in zip(prompts, OPTIONS, strict=False)]
    found = dict(LikelihoodScorer(settings, model, mesh, 96, 2)(tree, params, choices))
    assert sorted(found) == list(range(len(choices)))
    for i, log_probs in found.items():
        assert len(log_probs) == len(OPTIONS[i])
        for j, ours in enumerate(log_probs):  # the tokens that options share are not scored
            theirs = expected[f"scores_{i}_{j}"]
            np.testing.assert_allclose(ours, theirs[len(theirs) - len(ours) :], atol=1e-4)
    texts = [[int(token) for token in row if token >= 0] for row in expected["texts"]]
    # An end token that really comes up, so that rows end at different times.
    end = next(text[k] for text in texts for k in range(1, 9) if text[k : k + 1] and text[k] not in text[:k])
    trimmed = {k: trim(np.array(text), (end, NEVER)) for k, text in enumerate(texts)}
    generator = Generator(settings, model, mesh, (end, NEVER), MAX_NEW_TOKENS, num_slots=2)
    assert dict(generator(tree, params, prompts)) == trimmed
    assert len({len(text) for text in trimmed.values()}) > 1
