"""Damaged directories and adapters of each family are refused, and the message names the tensor or key."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from sqa_jax.adapters.peft_read import read_peft
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.sources import SafetensorsSource
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.checkpoints.weights import check_source, write_model
from sqa_jax.errors import UserError
from tests.support.peft_pair import Pair
from tests.support.torch_models import ENCODER_DECODERS, FAMILIES


@pytest.fixture(scope="module", params=FAMILIES | ENCODER_DECODERS)
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Pair]:
    """A decoder-only model and an encoder–decoder."""
    return {family: Pair(family, tmp_path_factory.mktemp("other") / family) for family in ("llama", "t5")}


@pytest.fixture
def copy(pair, tmp_path) -> Path:
    return Path(shutil.copytree(pair.directory, tmp_path / "copy"))


def refused(action, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_missing_and_misshapen_tensors_are_named(pair, monkeypatch):
    """Before any of them is read."""
    source, config = SafetensorsSource(pair.directory), pair.student.config
    monkeypatch.setattr(source, "read", None)
    all_shapes = dict(source.shapes)
    check_source(source, config)
    for name, shape in all_shapes.items():
        source.shapes = {other: kept for other, kept in all_shapes.items() if other != name}
        refused(lambda: check_source(source, config), f"tensor {name} {shape} is missing", "fetch")
        source.shapes = all_shapes | {name: (*shape, 2)}
        refused(lambda: check_source(source, config), f"tensor {name} has shape {(*shape, 2)}", str(shape), "fetch")
    source.shapes = all_shapes | {"model.vision.weight": (3,)}
    refused(lambda: check_source(source, config), "tensor model.vision.weight is not part of the configured model")


def test_layers_and_widths_of_another_configuration(pair, copy):
    layers, width = ("num_layers", "d_ff") if pair.is_encoder_decoder else ("num_hidden_layers", "intermediate_size")
    raw = json.loads((copy / "config.json").read_text())
    more = {"layer_types": [*raw["layer_types"], "full_attention"]} if raw.get("layer_types") else {}
    more |= {"no_rope_layers": [*raw["no_rope_layers"], 1]} if raw.get("no_rope_layers") else {}
    change(copy / "config.json", **{layers: raw[layers] + 1}, **more)
    refused(lambda: load_student(str(copy)), str(copy), f".{raw[layers]}.", "is missing")
    (copy / "config.json").write_text(json.dumps(raw | {width: 81}))
    refused(lambda: load_student(str(copy)), str(copy), "80", "the configuration says", "81")


def test_an_output_layer_that_the_configuration_asks_for(pair, copy):
    """Without it a student would use its embedding table as output layer."""
    change(copy / "config.json", tie_word_embeddings=False)
    if pair.student.config.tie_embeddings:
        refused(lambda: load_student(str(copy)), "tensor lm_head.weight (264, 48) is missing")
    else:
        assert load_student(str(copy)).fingerprint == pair.student.fingerprint


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_an_unknown_rope(pair, copy):
    rope = json.loads((copy / "config.json").read_text())["rope_parameters"]
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    for ropes in [{**rope, kind: yarn} for kind in rope] if "full_attention" in rope else [yarn]:
        change(copy / "config.json", rope_parameters=ropes)
        refused(lambda: load_student(str(copy)), f"{copy}/config.json", "rope type 'yarn'", "supported: default")


def test_a_missing_shard(pair, copy):
    (copy / "model.safetensors").unlink()
    write_model(pair.student.params, pair.student.config, copy, shard_size="60KB")
    assert load_student(str(copy)).config == pair.student.config
    shards = sorted(copy.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(lambda: load_student(str(copy)), f"{shards[1]}: shard not found", "fetch it again")


def test_tokenizers(pair, copy):
    settings = copy / "tokenizer_config.json"
    original = settings.read_text()
    change(settings, eos_token=None)
    refused(lambda: load_student(str(copy)), str(copy), "no end token", "set eos_token in tokenizer_config.json")
    settings.write_text(original)
    change(settings, pad_token=None)
    if pair.is_encoder_decoder:  # it is the token that the decoder starts from
        refused(
            lambda: load_student(str(copy)), "token 0 ('<|pad|>'), which the decoder starts from", "is not a special"
        )
    else:  # padding is marked by its segment, not by its id
        assert load_student(str(copy)).tokenizer.pad_token == "<|im_end|>"


def test_extended_vocabularies(pair, copy):
    """An embedding for each token is needed; more embeddings than tokens are usual."""
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 260 and pair.student.config.vocab_size == 264
    tokenizer.add_tokens([f"<new_{k}>" for k in range(4)])
    tokenizer.save_pretrained(copy)
    assert len(load_student(str(copy)).tokenizer) == 264
    tokenizer.add_tokens(["<one_more>"])
    tokenizer.save_pretrained(copy)
    refused(lambda: load_student(str(copy)), str(copy), "up to 264 ('<one_more>')", "264 embeddings", "published with")
    # Fewer tokens than embeddings do not help where ids are skipped.
    byte_tokenizer().save_pretrained(copy)
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["model"]["vocab"]["far"] = 300
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    refused(lambda: load_student(str(copy)), "up to 300 ('far')", "264 embeddings")


def test_adapters_for_another_base(pair, reference, tmp_path):
    """By shape, and by the names of the layers."""
    student = pair.student.config
    folder, prompt, prefix = (
        Path(shutil.copytree(pair.adapter(reference, method), tmp_path / method))
        for method in ("lora", "prompt", "prefix")
    )
    wider = dataclasses.replace(student, hidden_size=64)
    for adapter, name in ((folder, ".lora_A.weight has shape (4, 48)"), (prompt, "prompt_embeddings has shape (")):
        refused(
            lambda adapter=adapter: read_peft(adapter, wider),
            str(adapter),
            name,
            "64)",
            "the adapter is for another base",
        )
    heads = dataclasses.replace(student, head_dim=2 * student.head_dim)
    refused(lambda: read_peft(prefix, heads), str(prefix), "prompt_embeddings has shape", "another base")

    raw = json.loads((folder / "adapter_config.json").read_text())
    change(folder / "adapter_config.json", target_modules=[*raw["target_modules"], "query"])
    known = "q, k, v, o, wi_0" if pair.is_encoder_decoder else "q_proj, k_proj, v_proj, o_proj"
    refused(lambda: read_peft(folder, student), str(folder), "target_modules ['query']", known)


def test_adapters_of_other_families(pair, others, reference):
    """An encoder–decoder's on decoder-only models, and the reverse."""
    other = others["llama" if pair.is_encoder_decoder else "t5"]
    for method, part in (("lora", "target_modules"), ("prefix", "num_transformer_submodules is")):
        folder = other.adapter(reference, method)
        refused(lambda folder=folder: read_peft(folder, pair.student.config), str(folder), part)
