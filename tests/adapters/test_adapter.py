"""Adapter trees: equations against NumPy and PEFT, initialisation, merge, gradients."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sqa_jax import adapters
from sqa_jax.adapters.peft_format import to_peft, write_peft
from sqa_jax.checkpoints.weights import param_shapes, save_safetensors
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.soft_tokens import with_soft_tokens

CONFIG = DecoderConfig(61, 32, 48, 2, 4, 2, 8, tie_embeddings=True)
LAYERS = tuple(CONFIG.linear_shapes())
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


def randomized(shapes, spread=0.3):
    """Random values for a tree of shapes: nothing is zero, and they depend on NumPy alone."""
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, spread, leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def base():
    return randomized(param_shapes(CONFIG), 0.2)


def config_for(*methods, **lora):
    config = default().adapter.copy_and_resolve_references()
    config.methods = methods
    config.prefix.length, config.prefix.hidden, config.prompt.length = 5, 24, 3
    with config.unlocked():
        for key, value in lora.items():
            config.lora[key] = value
    return config


def random_adapter(config, base):
    """An adapter of random values."""
    return randomized(jax.eval_shape(lambda base: adapters.init_adapter(config, CONFIG, base, 0), base))


def logits(config, tree, base, tokens):
    """Logits of the vocabulary tokens, after the soft prompt tokens where the adapter has some."""
    count = adapters.soft_prompt_tokens(config).count if tree else 0
    tokens = jnp.asarray([with_soft_tokens(row, count) for row in tokens])
    return np.asarray(compiled_forward(config.to_json() if tree else "")(tree, base, tokens))[:, count:]


@functools.cache
def compiled_forward(adapter_settings: str):
    """(adapter, base, tokens) → logits, compiled once for all adapters of the same settings, "" for none."""
    config = ConfigDict(json.loads(adapter_settings)) if adapter_settings else default().adapter

    def forward(tree, base, tokens):
        inputs, params = adapters.adapter_inputs(config, tree, CONFIG), adapters.model_params(tree, base)
        positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
        return Decoder(CONFIG).apply(
            {"params": params}, tokens, positions, jnp.ones_like(positions), inputs, method="logits"
        )[0]

    return jax.jit(forward)


@settings(max_examples=6, deadline=None)
@given(targets=st.sets(st.sampled_from(LAYERS), min_size=1), rank=st.integers(1, 5), rslora=st.booleans())
def test_new_lora_changes_no_logit_and_a_trained_one_merges(base, targets, rank, rslora):
    config = config_for("lora", targets=tuple(sorted(targets)), rank=rank, rslora=rslora, alpha=3.0)
    tree = adapters.init_adapter(config, CONFIG, base, 0)
    bare = logits(config, {}, base, TOKENS)
    np.testing.assert_array_equal(logits(config, tree, base, TOKENS), bare)
    tree = random_adapter(config, base)
    adapted = logits(config, tree, base, TOKENS)
    assert np.abs(adapted - bare).max() > 1e-3
    merged = adapters.merge(config, tree, base, CONFIG)
    np.testing.assert_allclose(logits(config, {}, merged, TOKENS), adapted, atol=2e-4)


def test_lora_equals_its_equation(base):
    """One layer's merged kernel against the paper's equation in NumPy float64."""
    config = config_for("lora", targets=("q_proj",), rank=3, alpha=7.0)
    tree = random_adapter(config, base)
    merged = adapters.merge(config, tree, base, CONFIG)
    kernel = np.asarray(base["layers"]["self_attn"]["q_proj"]["kernel"], np.float64)
    a, b = (np.asarray(tree["lora"]["q_proj"][name], np.float64) for name in "ab")
    for layer in range(CONFIG.num_layers):
        expected = kernel[layer] + 7.0 / 3 * a[layer] @ b[layer]
        np.testing.assert_allclose(merged["layers"]["self_attn"]["q_proj"]["kernel"][layer], expected, atol=1e-5)


def peft_logits(config, base, tree, directory) -> dict[str, np.ndarray]:
    """PEFT's logits at the vocabulary tokens, from the files that we write of the base and the adapter."""
    import peft
    import torch
    import transformers

    save_safetensors(base, CONFIG, directory / "base")
    files = to_peft(config, tree, CONFIG, str(directory / "base"))
    write_peft(files, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "base")
    model = peft.PeftModel.from_pretrained(model, directory).eval()
    ((_, tensors),) = files.values()
    if "lora" in tree:
        stored = {key: torch.tensor(values) for key, values in tensors.items()}
        result = peft.set_peft_model_state_dict(model, stored)
        assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    with torch.no_grad():
        return {"logits": model(torch.tensor(TOKENS)).logits.numpy()[:, -TOKENS.shape[1] :]}


@pytest.mark.parametrize(
    ("name", "method", "change"),
    [
        ("lora", "lora", {}),
        ("lora-rslora", "lora", {"lora.rslora": True}),
        ("prefix", "prefix", {"prefix.reparametrize": False}),
        ("prefix-reparametrized", "prefix", {"prefix.reparametrize": True}),
        ("prompt", "prompt", {}),
    ],
)
def test_logits_equal_peft(base, reference, tmp_path, name, method, change):
    config = config_for(method, rank=4, alpha=6.0)
    config.update_from_flattened_dict(change)
    tree = random_adapter(config, base)
    expected = reference(
        f"adapters/equations/{name}", lambda: peft_logits(config, base, tree, tmp_path), tolerance=1e-4
    )
    np.testing.assert_allclose(logits(config, tree, base, TOKENS), expected["logits"], atol=1e-4)


def test_methods_combine(base):
    """Each method of a combination has its effect, and a gradient."""
    config = config_for("lora", "prefix", "prompt")
    tree = random_adapter(config, base)
    together = logits(config, tree, base, TOKENS)
    for method in tree:
        others = {name: part for name, part in tree.items() if name != method}
        partial = config_for(*others)
        assert np.abs(logits(partial, others, base, TOKENS) - together).max() > 1e-3

    def loss(tree):
        tokens = jnp.asarray([with_soft_tokens(row, 3) for row in TOKENS])
        positions = jnp.tile(jnp.arange(12), (2, 1))
        out, _ = Decoder(CONFIG).apply(
            {"params": base},
            tokens,
            positions,
            jnp.ones_like(positions),
            adapters.adapter_inputs(config, tree, CONFIG),
            method="logits",
        )
        return jnp.square(out).mean()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(tree)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_full_fine_tuning_is_the_model(base):
    config = config_for("full")
    tree = adapters.init_adapter(config, CONFIG, base, 0)
    np.testing.assert_array_equal(logits(config, tree, {}, TOKENS), logits(config, {}, base, TOKENS))
    assert adapters.merge(config, tree, {}, CONFIG) is tree["full"]


def test_prefix_starts_as_activations_of_real_tokens(base):
    """A prefix without reparametrisation starts as the KV cache after the prefill of some tokens."""
    config = config_for("prefix")
    config.prefix.reparametrize = False
    tree = adapters.init_adapter(config, CONFIG, base, 0)
    with_prefix = logits(config, tree, base, TOKENS)
    # The tokens are drawn inside; the same distribution of logits as after some text is all that can be asked,
    # and it is far from what an all-zero prefix gives.
    zero = jax.tree.map(jnp.zeros_like, tree)
    assert np.abs(with_prefix - logits(config, zero, base, TOKENS)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(methods=("lora", "full")), "full fine-tuning"),
        (dict(methods=("lara",)), "lara"),
        (dict(methods=()), "one or more"),
        (dict(targets=("q_proj", "query")), "query"),
        (dict(rank=0), "rank"),
    ],
)
def test_unusable_settings_are_named(base, change, message):
    config = config_for(*change.pop("methods", ("lora",)), **change)
    with pytest.raises(UserError, match=message):
        adapters.init_adapter(config, CONFIG, base, 0)
