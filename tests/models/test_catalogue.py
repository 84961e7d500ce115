"""Published students: sizes of their model cards, and each configuration with a small model of its architecture."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import jax
import pytest

from sqa_jax import adapters
from sqa_jax.checkpoints.hf_config import from_hf, to_hf
from sqa_jax.checkpoints.tokenizer import byte_tokenizer, load_tokenizer
from sqa_jax.checkpoints.weights import random_params, save_safetensors
from sqa_jax.errors import UserError
from sqa_jax.models.catalogue import CATALOGUE, SHAPES
from sqa_jax.models.params import param_specs
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.runtime import build_runtime, make_decoder

# Millions of parameters on the models' cards.
CARDS = {
    "smollm2-135m": 135, "smollm2-360m": 362, "smollm2-1.7b": 1711, "smollm3-3b": 3075, "llama-3-8b": 8030,
    "llama-3.2-1b": 1236, "llama-3.2-3b": 3213, "llama-3.1-8b": 8030, "qwen2.5-0.5b": 494, "qwen2.5-1.5b": 1544,
    "qwen2.5-3b": 3086, "qwen2.5-7b": 7616, "qwen3-0.6b": 596, "qwen3-1.7b": 1721, "qwen3-4b": 4022, "qwen3-8b": 8191,
    "gemma2-2b": 2614, "gemma2-9b": 9242, "gemma3-270m": 268, "gemma3-1b": 1000,
    "flan-t5-small": 77, "flan-t5-base": 248, "flan-t5-large": 783, "flan-t5-xl": 2850,
    "paligemma-3b": 2923, "paligemma2-3b": 3032, "smolvlm-256m": 256, "smolvlm-500m": 507, "qwen2-vl-2b": 2209,
}  # fmt: skip


def settings(which):
    spec = importlib.util.spec_from_file_location("student", "configs/student.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(which)


def small_version(config):
    """The same architecture, small."""
    if isinstance(config, T5Config):
        return dataclasses.replace(
            config, vocab_size=264, hidden_size=32, intermediate_size=48, num_layers=2, num_encoder_layers=2, num_heads=4,
            head_dim=8,
        )  # fmt: skip
    vision = config.vision
    if isinstance(vision, Qwen2VLVision):
        ids = {"image_token": 260, "vision_start": 261, "vision_end": 262}
        vision = dataclasses.replace(vision, width=32, embed_dim=16, depth=2, num_heads=2, **ids)
    elif vision is not None:
        encoder = dataclasses.replace(
            vision.encoder, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, image_size=64, patch_size=8
        )
        vision = dataclasses.replace(vision, encoder=encoder, width=32, image_token=260)
        if hasattr(vision, "longest_edge"):
            vision = dataclasses.replace(vision, longest_edge=4 * encoder.image_size)
    kinds = config.layer_types and (*config.layer_types[:3], *config.layer_types[-1:])
    return dataclasses.replace(
        config, vocab_size=304, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4,
        num_kv_heads=max(1, 4 * config.num_kv_heads // config.num_heads), head_dim=8, layer_types=kinds,
        window=config.window and 16, query_scale=config.query_scale and 16, vision=vision,
        mrope_sections=config.mrope_sections and (1, 1, 2),
    )  # fmt: skip


@pytest.mark.parametrize("name", CATALOGUE)
def test_sizes_are_those_of_the_cards(name):
    config = CATALOGUE[name].config
    assert round(sum(math.prod(leaf.shape) for leaf in param_specs(config)) / 1e6) == CARDS[name]
    assert from_hf(to_hf(config), name) == config


SMALL = {small_version(published.config): name for name, published in reversed(CATALOGUE.items())}


@pytest.mark.parametrize(("small", "name"), SMALL.items(), ids=SMALL.values())
def test_a_small_model_of_each_architecture_is_loaded_by_its_configuration(small, name, tmp_path):
    save_safetensors(random_params(small, 0), small, tmp_path / "model")
    byte_tokenizer(small.vision).save_pretrained(tmp_path / "model")
    config = settings(f"{name},lora,prompt")
    config.student.path = str(tmp_path / "model")
    runtime = build_runtime(config)
    assert runtime.student.config == small
    tree = jax.eval_shape(lambda base: adapters.init_adapter(config.adapter, small, base, 0), runtime.student.params)
    assert set(tree) == {"lora", "prompt"}


@pytest.mark.parametrize("name", CATALOGUE)
def test_configurations_name_the_published_model(name):
    config = settings(f"{name},lora,prompt")
    assert config.student.path == CATALOGUE[name].hub and config.adapter.methods == ("lora", "prompt")


def test_rates_fall_with_the_methods_and_the_size():
    rate = {which: settings(which).optimizer.learning_rate for which in ("qwen3-0.6b", "qwen3-4b", "qwen3-0.6b,full")}
    assert rate["qwen3-0.6b,full"] < rate["qwen3-4b"] < rate["qwen3-0.6b"]


@pytest.mark.parametrize("which", ["gpt-5,lora", "qwen3-0.6b,dora"])
def test_unknown_names_are_refused(which):
    with pytest.raises(UserError, match="choose of"):
        settings(which)


def test_a_published_shape_is_planned_without_its_weights():
    config = settings("gemma2-2b")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    decoder = make_decoder(config, CATALOGUE["gemma2-2b"].config, mesh)
    assert decoder.config.attention_softcap == 50.0 and decoder.fused is None  # CPUs have no fused attention


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if isinstance(shape, T5Config)])
def test_random_encoder_decoders_have_a_decoder_start_token(name):
    assert load_tokenizer(f"random:{name}").decoder_start_token == "<|pad|>"
