"""T5 checkpoints and configurations: what is damaged or contradicts itself is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.weights import save_safetensors
from sqa_jax.errors import UserError
from sqa_jax.models.t5.config import from_hf, to_hf
from tests.support.t5_checkpoint import SEQUENCES, Checkpoint, torch_logits, write_tokenizer
from tests.support.torch_models import torch_model


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    return Checkpoint("flan", tmp_path_factory.mktemp("flan"))


def test_saved_weights_are_those_of_the_checkpoint(flan, tmp_path):
    """The files that `test_saved_weights_load_in_transformers` reads with transformers."""
    save_safetensors(flan.params, flan.config, tmp_path / "out")
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", flan.directory))
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    assert from_hf(json.loads((tmp_path / "out" / "config.json").read_text()), "out") == flan.config


@pytest.mark.live
@pytest.mark.parametrize("name", ["1.1, untied, gated", "1.0, tied, relu"])
def test_saved_weights_load_in_transformers(name, tmp_path):
    checkpoint = Checkpoint(name, tmp_path / "model")
    save_safetensors(checkpoint.params, checkpoint.config, tmp_path / "out")
    first, second = (torch_logits(torch_model(tmp_path / kind), *SEQUENCES[0]) for kind in ("model", "out"))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_copies_of_the_shared_table_are_checked(flan, tmp_path):
    """Files may repeat the table for each stack and hold a bias that is never used; a copy that differs is refused."""
    (tmp_path / "config.json").write_bytes((flan.directory / "config.json").read_bytes())
    write_tokenizer(tmp_path)
    tensors = load_file(flan.directory / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((8, 4), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_student(str(tmp_path)).params, flan.params)
    tensors["encoder.embed_tokens.weight"][60, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"encoder.embed_tokens.weight differs from the embeddings \(shared.weight\)"):
        load_student(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not supported; supported: gated-gelu"),
        ({"d_kv": None}, "head_dim is None"),
        ({"num_layers": 0}, "num_encoder_layers is 0"),
        ({"num_heads": True}, "num_heads is True"),
        ({"decoder_start_token_id": 97}, "decoder_start_token_id 97 is not one of the model's 97 tokens"),
        ({"relative_attention_num_buckets": 30}, "30 buckets of relative positions up to 20"),
        ({"relative_attention_max_distance": 4}, "8 buckets of relative positions up to 4"),
        ("d_ff", "key 'd_ff' is missing"),
    ],
)
def test_a_damaged_configuration_is_refused(flan, change, words):
    raw = to_hf(flan.config)
    raw = {k: v for k, v in raw.items() if k != change} if isinstance(change, str) else raw | change
    with pytest.raises(UserError, match=words):
        from_hf(raw, "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_decoder_layers": 10**9}, "tensors cannot be the configured 1000000000 layers"),
        ({"num_layers": 3}, r"encoder.block.2.*is missing, but the configuration asks for it"),
        ({"num_decoder_layers": 1}, r"decoder.block.1.*is not part of the configured model"),
        ({"d_ff": 81}, r"has shape \(80, 48\), but the configuration says \(81, 48\)"),
        ({"decoder_start_token_id": 50}, "token 50 .*is not a special token of its tokenizer"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(flan, tmp_path, change, words):
    save_safetensors(flan.params, flan.config, tmp_path / "out")
    write_tokenizer(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(to_hf(flan.config) | change))
    with pytest.raises(UserError, match=words):
        load_student(str(tmp_path / "out"))
