"""What each family's damaged directories and adapters are answered with: the tensor or key by its name, and no model."""

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
from sqa_jax.checkpoints.weights import check_source
from sqa_jax.errors import UserError
from tests.support.peft_pair import Pair
from tests.support.torch_models import ENCODER_DECODERS, FAMILIES


@pytest.fixture(scope="module", params=FAMILIES | ENCODER_DECODERS)
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture
def copy(pair, tmp_path) -> Path:
    return Path(shutil.copytree(pair.directory, tmp_path / "copy"))


def refused(act, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_tensor_must_be_there_and_fit(pair, monkeypatch):
    """Before any of them is read."""
    source, config = SafetensorsSource(pair.directory), pair.student.config
    monkeypatch.setattr(source, "read", None)
    whole = dict(source.shapes)
    check_source(source, config)
    for name, shape in whole.items():
        source.shapes = {other: own for other, own in whole.items() if other != name}
        refused(lambda: check_source(source, config), f"tensor {name} {shape} is missing", "fetch")
        source.shapes = whole | {name: (*shape, 2)}
        refused(lambda: check_source(source, config), f"tensor {name} has shape {(*shape, 2)}", str(shape), "fetch")
    source.shapes = whole | {"model.vision.weight": (3,)}
    refused(lambda: check_source(source, config), "tensor model.vision.weight is not part of the configured model")


def test_layers_and_widths_of_another_configuration(pair, copy):
    layers, width = ("num_layers", "d_ff") if pair.encodes else ("num_hidden_layers", "intermediate_size")
    raw = json.loads((copy / "config.json").read_text())
    more = {"layer_types": [*raw["layer_types"], "full_attention"]} if raw.get("layer_types") else {}
    more |= {"no_rope_layers": [*raw["no_rope_layers"], 1]} if raw.get("no_rope_layers") else {}
    change(copy / "config.json", **{layers: raw[layers] + 1}, **more)
    refused(lambda: load_student(str(copy)), str(copy), f".{raw[layers]}.", "is missing")
    (copy / "config.json").write_text(json.dumps(raw | {width: 81}))
    refused(lambda: load_student(str(copy)), str(copy), "80", "the configuration says", "81")


def test_an_output_layer_that_the_configuration_asks_for(pair, copy):
    """Without it a student would answer by its embeddings."""
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
    pair.reference().save_pretrained(copy, max_shard_size="60KB")
    load_student(str(copy))
    shards = sorted(copy.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(lambda: load_student(str(copy)), f"{shards[1]}: shard not found", "fetch it again")


def test_tokenizers(pair, copy):
    settings = copy / "tokenizer_config.json"
    whole = settings.read_text()
    change(settings, eos_token=None)
    refused(lambda: load_student(str(copy)), str(copy), "no end token", "set eos_token in tokenizer_config.json")
    settings.write_text(whole)
    change(settings, pad_token=None)
    if pair.encodes:  # the token that its decoder starts from
        refused(
            lambda: load_student(str(copy)), "token 0 ('<|pad|>'), which the decoder starts from", "is not a special"
        )
    else:  # padding is told by segment
        assert load_student(str(copy)).tokenizer.pad_token == "<|im_end|>"


def test_extended_vocabularies(pair, copy):
    """Fewer tokens than rows are usual, a row for each is needed."""
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 260 and pair.student.config.vocab_size == 264
    tokenizer.add_tokens([f"<own_{k}>" for k in range(4)])
    tokenizer.save_pretrained(copy)
    assert len(load_student(str(copy)).tokenizer) == 264
    tokenizer.add_tokens(["<one_more>"])
    tokenizer.save_pretrained(copy)
    refused(lambda: load_student(str(copy)), str(copy), "up to 264 ('<one_more>')", "264 embeddings", "published with")
    # Fewer tokens than rows do not help where numbers are left out.
    byte_tokenizer().save_pretrained(copy)
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["model"]["vocab"]["far"] = 300
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    refused(lambda: load_student(str(copy)), "up to 300 ('far')", "264 embeddings")


def test_adapters_for_another_base(pair, tmp_path):
    """By shape, and by the names of the layers."""
    student = pair.student.config
    folder, prompt, prefix = (pair.save(pair.config(m), tmp_path / m) for m in ("lora", "prompt", "prefix"))
    wider = dataclasses.replace(student, hidden_size=64)
    for one, name in ((folder, ".lora_A.weight has shape (4, 48)"), (prompt, "prompt_embeddings has shape (")):
        refused(lambda one=one: read_peft(one, wider), str(one), name, "64)", "the adapter is for another base")
    heads = dataclasses.replace(student, head_dim=2 * student.head_dim)
    refused(lambda: read_peft(prefix, heads), str(prefix), "prompt_embeddings has shape", "another base")

    raw = json.loads((folder / "adapter_config.json").read_text())
    change(folder / "adapter_config.json", target_modules=[*raw["target_modules"], "query"])
    known = "q, k, v, o, wi_0" if pair.encodes else "q_proj, k_proj, v_proj, o_proj"
    refused(lambda: read_peft(folder, student), str(folder), "target_modules ['query']", known)


def test_adapters_of_other_families(pair, tmp_path):
    """Encoder–decoders' on decoders, and the other way."""
    other = Pair("llama" if pair.encodes else "t5", tmp_path / "other")
    for method, words in (("lora", "target_modules"), ("prefix", "num_transformer_submodules is")):
        folder = other.save(other.config(method), tmp_path / method)
        refused(lambda folder=folder: read_peft(folder, pair.student.config), str(folder), words)
