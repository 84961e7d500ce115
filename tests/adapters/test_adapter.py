"""Adapter trees: equations against NumPy and PEFT, initialisation, merge, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax import adapters
from sqa_jax.checkpoints.weights import random_params, save_safetensors
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.soft_tokens import with_soft_tokens

CONFIG = DecoderConfig(61, 32, 48, 2, 4, 2, 8, tie_embeddings=True)
LAYERS = tuple(CONFIG.linear_shapes())


@pytest.fixture(scope="module")
def base():
    return random_params(CONFIG, 0)


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "model"
    save_safetensors(base, CONFIG, directory)
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def config_for(*methods, **lora):
    config = default().adapter.copy_and_resolve_references()
    config.methods = methods
    config.prefix.length, config.prefix.hidden, config.prompt.length = 5, 24, 3
    with config.unlocked():
        for key, value in lora.items():
            config.lora[key] = value
    return config


def shaken(tree, scale=0.3):
    """The tree away from its start, so that nothing is zero."""
    keys = iter(jax.random.split(jax.random.key(9), 1000))
    return jax.tree.map(lambda leaf: leaf + scale * jax.random.normal(next(keys), leaf.shape), tree)


def logits(config, tree, base, tokens):
    """Logits of the real tokens, with a soft prompt's in front where the adapter has one."""
    virtual = adapters.soft_prompt_tokens(config).count if tree else 0
    tokens = np.asarray([with_soft_tokens(row, virtual) for row in tokens])
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    out, _ = Decoder(CONFIG).apply(
        {"params": adapters.model_params(tree, base)}, jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(positions),
        adapters.adapter_inputs(config, tree, CONFIG), method="logits",
    )  # fmt: skip
    return np.asarray(out)[:, virtual:]


TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


@settings(max_examples=12, deadline=None)
@given(targets=st.sets(st.sampled_from(LAYERS), min_size=1), rank=st.integers(1, 5), rslora=st.booleans())
def test_new_lora_changes_no_logit_and_a_trained_one_merges(base, targets, rank, rslora):
    config = config_for("lora", targets=tuple(sorted(targets)), rank=rank, rslora=rslora, alpha=3.0)
    tree = adapters.init_adapter(config, CONFIG, base, 0)
    bare = logits(config, {}, base, TOKENS)
    np.testing.assert_array_equal(logits(config, tree, base, TOKENS), bare)
    tree = shaken(tree)
    adapted = logits(config, tree, base, TOKENS)
    assert np.abs(adapted - bare).max() > 1e-3
    merged = adapters.merge(config, tree, base, CONFIG)
    np.testing.assert_allclose(logits(config, {}, merged, TOKENS), adapted, atol=2e-4)


def test_lora_is_its_equation(base):
    """One layer's merged kernel against the paper's equation in NumPy float64."""
    config = config_for("lora", targets=("q_proj",), rank=3, alpha=7.0)
    tree = shaken(adapters.init_adapter(config, CONFIG, base, 0))
    merged = adapters.merge(config, tree, base, CONFIG)
    kernel = np.asarray(base["layers"]["self_attn"]["q_proj"]["kernel"], np.float64)
    a, b = (np.asarray(tree["lora"]["q_proj"][name], np.float64) for name in "ab")
    for layer in range(CONFIG.num_layers):
        expected = kernel[layer] + 7.0 / 3 * a[layer] @ b[layer]
        np.testing.assert_allclose(merged["layers"]["self_attn"]["q_proj"]["kernel"][layer], expected, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equals_peft(base, reference, rslora):
    config = config_for("lora", rank=4, alpha=6.0, rslora=rslora)
    tree = shaken(adapters.init_adapter(config, CONFIG, base, 0))
    model = peft.get_peft_model(
        reference(),
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=list(LAYERS), lora_dropout=0.0),
    )
    ours = {}
    for name, layer in tree["lora"].items():
        module = CONFIG.linear_shapes()[name][0]
        for i in range(CONFIG.num_layers):
            key = f"base_model.model.model.layers.{i}.{module}.{name}"
            ours[f"{key}.lora_A.weight"] = torch.tensor(np.asarray(layer["a"][i]).T.copy())
            ours[f"{key}.lora_B.weight"] = torch.tensor(np.asarray(layer["b"][i]).T.copy())
    result = peft.set_peft_model_state_dict(model, ours)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora" in k]
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(config, tree, base, TOKENS), theirs, atol=1e-4)


@pytest.mark.parametrize("reparametrize", [False, True])
def test_prefix_equals_peft(base, reference, reparametrize):
    config = config_for("prefix")
    config.prefix.reparametrize = reparametrize
    tree = shaken(adapters.init_adapter(config, CONFIG, base, 0))
    active = adapters.adapter_inputs(config, tree, CONFIG).prefix
    model = peft.get_peft_model(
        reference(),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, num_layers=2, num_attention_heads=2, token_dim=16
        ),
    )
    stacked = np.stack([active["key"], active["value"]], axis=2)  # [L, P, 2, K·d]
    flat = np.transpose(stacked, (1, 0, 2, 3)).reshape(5, -1)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(torch.tensor(flat))
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(config, tree, base, TOKENS), theirs, atol=1e-4)


def test_prompt_equals_peft(base, reference):
    config = config_for("prompt")
    tree = shaken(adapters.init_adapter(config, CONFIG, base, 0))
    model = peft.get_peft_model(reference(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(torch.tensor(np.asarray(tree["prompt"]["embedding"])))
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(config, tree, base, TOKENS), theirs[:, 3:], atol=1e-4)


def test_methods_combine(base):
    """Each method of a combination has its effect, and a gradient."""
    config = config_for("lora", "prefix", "prompt")
    tree = shaken(adapters.init_adapter(config, CONFIG, base, 0))
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

    for leaf in jax.tree.leaves(jax.grad(loss)(tree)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_full_is_the_model(base):
    config = config_for("full")
    tree = adapters.init_adapter(config, CONFIG, base, 0)
    np.testing.assert_array_equal(logits(config, tree, {}, TOKENS), logits(config, {}, base, TOKENS))
    assert adapters.merge(config, tree, {}, CONFIG) is tree["full"]


def test_prefix_starts_as_activations_of_real_tokens(base):
    """A prefix without reparametrisation is what reading its tokens would have left in the cache."""
    config = config_for("prefix")
    config.prefix.reparametrize = False
    tree = adapters.init_adapter(config, CONFIG, base, 0)
    with_prefix = logits(config, tree, base, TOKENS)
    # The tokens are drawn inside; the same distribution of logits as after some text is all that can be asked,
    # and it is far from what an all-zero prefix gives.
    zero = jax.tree.map(jnp.zeros_like, tree)
    assert np.abs(with_prefix - logits(config, zero, base, TOKENS)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(methods=("lora", "full")), "full fine-tuning"),
        (dict(methods=("lara",)), "lara"),
        (dict(methods=()), "one or more"),
        (dict(targets=("q_proj", "query")), "query"),
        (dict(rank=0), "rank"),
    ],
)
def test_unusable_settings_are_named(base, change, words):
    config = config_for(*change.pop("methods", ("lora",)), **change)
    with pytest.raises(UserError, match=words):
        adapters.init_adapter(config, CONFIG, base, 0)
