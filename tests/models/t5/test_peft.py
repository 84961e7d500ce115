"""T5's adapters against PEFT's: LoRA, prefix tuning and prompt tuning, with the same random parameters."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sqa_jax import adapters
from sqa_jax.models.adaptation import NO_ADAPTATION
from sqa_jax.models.params import linear_layers
from tests.support.t5_adapters import adapter_settings, assert_scores_and_texts, random_tree
from tests.support.t5_checkpoint import SEQUENCES, Checkpoint, generated_without_cache, packed_row, torch_results
from tests.support.torch_models import torch_model


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    return Checkpoint("flan", tmp_path_factory.mktemp("flan"))


def compare(name, reference, checkpoint: Checkpoint, settings, tree, wrap) -> None:
    """Our scores and texts with `tree`, and those of PEFT's model that `wrap` makes of transformers'."""

    def compute():
        return torch_results(wrap(torch_model(checkpoint.directory)).eval(), generated_without_cache)

    expected = reference(f"models/t5/peft-{name}-{checkpoint.name}", compute, tolerance=5e-5)
    assert_scores_and_texts(expected, checkpoint, settings, tree)


def test_lora_equals_peft(flan, reference):
    settings = adapter_settings("lora")
    settings.lora.targets = ("q", "wo", "k")
    tree = random_tree(settings, flan.config, flan.params)
    assert len(tree["lora"]) == 2 * 3 + 2

    def wrap(model):
        import peft
        import torch

        config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=4, target_modules=["q", "wo", "k"])
        model, tensors = peft.get_peft_model(model, config), {}
        for name, pair in tree["lora"].items():
            for i, key in enumerate(linear_layers(flan.config)[name].names):
                key = f"base_model.model.{key.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"] = torch.tensor(pair["a"][i].T.copy())
                tensors[f"{key}.lora_B.weight"] = torch.tensor(pair["b"][i].T.copy())
        result = peft.set_peft_model_state_dict(model, tensors)
        assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora" in k]
        return model

    compare("lora", reference, flan, settings, tree, wrap)
    merged = adapters.merge(settings, tree, flan.params, flan.config)
    row = packed_row(SEQUENCES, 80, 40)

    @jax.jit
    def hidden(params, adaptation):
        return flan.model.apply({"params": params}, row.tokens, row.positions, row.segments, adaptation)[0]

    adapted = hidden(flan.params, adapters.adapter_inputs(settings, tree, flan.config))
    np.testing.assert_allclose(adapted, hidden(merged, NO_ADAPTATION), atol=1e-3)


@pytest.mark.parametrize("name", ["1.1, untied, gated", "1.0, tied, relu"])
def test_prefix_equals_peft(name, tmp_path, reference):
    """With an odd number of decoder layers (a prefix each), and an even one (two layers share one, as in PEFT)."""
    checkpoint, settings = Checkpoint(name, tmp_path), adapter_settings("prefix")
    L = checkpoint.config.num_layers
    tree = random_tree(settings, checkpoint.config, checkpoint.params, spread=0.5)
    prefixes = np.stack([tree["prefix"]["key"], tree["prefix"]["value"]], axis=1)  # [n, 2, P, H·d]
    assert len(prefixes) == (L if L % 2 else L // 2)

    def wrap(model):
        import peft
        import torch

        stored = np.zeros((L, *prefixes.shape[1:]), np.float32)
        stored[[2 * j % L for j in range(len(prefixes))]] = prefixes
        config = peft.PrefixTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_layers=L, num_attention_heads=4, token_dim=40
        )
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            flat = torch.tensor(stored.transpose(2, 0, 1, 3).reshape(3, -1))
            model.prompt_encoder["default"].embedding.weight.copy_(flat)
        return model

    compare("prefix", reference, checkpoint, settings, tree, wrap)


def test_prompt_equals_peft(flan, reference):
    settings = adapter_settings("prompt")
    tree = random_tree(settings, flan.config, flan.params)

    def wrap(model):
        import peft
        import torch

        model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5))
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight[:5] = torch.tensor(tree["prompt"]["embedding"])
        return model

    compare("prompt", reference, flan, settings, tree, wrap)
