"""Adapters to and from PEFT's files, held against PEFT itself: logits, greedy texts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from sqa_jax import adapters
from sqa_jax.adapters.peft_format import _targets, lora_modules, to_peft, write_peft
from sqa_jax.adapters.peft_read import read_peft
from sqa_jax.checkpoints.weights import save_safetensors
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.decoder import Decoder
from tests.support.peft_pair import TOKENS, Pair, their_logits, their_texts
from tests.support.torch_models import ENCODER_DECODERS, FAMILIES

METHODS = ("lora", "prefix", "projected prefix", "prompt")


@pytest.fixture(scope="module", params=FAMILIES | ENCODER_DECODERS)
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Pair:
    """For what does not depend on the family."""
    return Pair("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("method", METHODS)
def test_peft_to_ours_to_peft(pair, tmp_path, method):
    """Each way, logits and greedy texts are those of PEFT."""
    made = pair.theirs(pair.save(pair.config(method), tmp_path / "made"))
    settings, tree = pair.ours(tmp_path / "made")
    expected = their_logits(made)
    assert np.abs(expected - their_logits(pair.reference())).max() > 1e-2
    np.testing.assert_allclose(pair.logits(settings, tree), expected, atol=1e-4)
    texts = pair.generated(settings, tree)
    assert texts == their_texts(made) != their_texts(pair.reference())
    (tmp_path / "again").mkdir()
    write_peft(to_peft(settings, tree, pair.student.config, str(pair.directory)), tmp_path / "again")
    again = pair.theirs(tmp_path / "again")
    np.testing.assert_allclose(their_logits(again), expected, atol=1e-5)
    assert their_texts(again) == texts


LORAS = {
    "rank-stabilised": dict(use_rslora=True),
    "ranks": dict(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}),
    "alphas": dict(alpha_pattern={"self_attn.v_proj": 3, r"layers\.[02]\.self_attn\.q_proj": 1}),
    "all at once": dict(use_rslora=True, rank_pattern={r".*\.0\..*_proj": 6}, alpha_pattern={"^model.layers.2.mlp.down_proj": 9}),
    "expression": dict(target_modules=r".*\.(1|2)\.self_attn\.[qk]_proj"),
    "all-linear": dict(target_modules="all-linear", rank_pattern={"k_proj": 8}),
    "some layers": dict(layers_to_transform=[0, 2], layers_pattern="layers"),
    "one layer": dict(layers_to_transform=1),
    "left out": dict(exclude_modules=["layers.0.self_attn.q_proj", "down_proj"]),
    "orthogonal": dict(init_lora_weights="orthogonal"),
}  # fmt: skip


@pytest.mark.parametrize("variant", LORAS)
def test_every_kind_of_lora_is_read(llama, tmp_path, variant):
    options = dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options | LORAS[variant])
    expected = their_logits(llama.theirs(llama.save(config, tmp_path / "made")))
    settings, tree = llama.ours(tmp_path / "made")
    np.testing.assert_allclose(llama.logits(settings, tree), expected, atol=1e-4)
    # What PEFT saves of "all-linear" is the list of what it found; a file written by hand may say the words.
    raw = json.loads((tmp_path / "made/adapter_config.json").read_text())
    if variant == "all-linear":
        (tmp_path / "made/adapter_config.json").write_text(json.dumps({**raw, "target_modules": "all-linear"}))
        jax.tree.map(np.testing.assert_array_equal, llama.ours(tmp_path / "made")[1], tree)


def test_what_is_missing_in_rank_and_layers_has_no_gradient(llama, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], rank_pattern={r"2\.self_attn\.q_proj": 2})  # fmt: skip
    settings, tree = llama.ours(llama.save(config, tmp_path / "made"))
    student, weights = llama.student.config, jax.tree.map(jnp.asarray, tree)
    places = np.tile(np.arange(TOKENS.shape[1]), (2, 1))

    def loss(tree):
        adaptation = adapters.adapter_inputs(settings, tree, student)
        out, _ = Decoder(student).apply({"params": llama.student.params}, TOKENS, places, np.ones_like(TOKENS), adaptation, method="logits")  # fmt: skip
        return jnp.square(out).mean()

    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(weights)["lora"])
    for name, layer in tree["lora"].items():
        for index in range(student.num_layers):
            rank = 0 if index == 1 else 2 if (name, index) == ("q_proj", 2) else 4
            for values in (layer, gradient[name]):
                assert np.all(values["a"][index, :, :rank] != 0) and np.all(values["b"][index, :rank] != 0)
                assert not values["a"][index, :, rank:].any() and not values["b"][index, rank:].any()


def made_here(pair, methods, **options):
    """(settings, tree) of a new adapter, moved away from its start so that nothing is zero."""
    settings = default().adapter
    settings.methods, settings.prefix.length, settings.prefix.hidden, settings.prompt.length = methods, 5, 24, 3
    settings.update_from_flattened_dict(options)

    def make(base):
        keys = iter(jax.random.split(jax.random.key(9), 100))
        tree = adapters.init_adapter(settings, pair.student.config, base, 0)
        return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), tree)

    return settings, jax.jit(make)(pair.student.params)


def test_a_soft_prompt_starts_among_the_embeddings_that_layers_read(pair):
    """PEFT draws its start from what the embedding module gives; Gemma's is √D times the table."""
    task = "SEQ_2_SEQ_LM" if pair.encodes else "CAUSAL_LM"
    options = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    model = peft.get_peft_model(pair.reference(), options)
    with torch.no_grad():
        read = model.word_embeddings(torch.arange(264)).numpy()

    def start(init):
        settings = default().adapter
        settings.methods, settings.prompt.length, settings.prompt.init = ("prompt",), 64, init
        make = jax.jit(lambda base: adapters.init_adapter(settings, pair.student.config, base, 0))
        return np.asarray(make(pair.student.params)["prompt"]["embedding"])

    assert all(np.isclose(read, row, rtol=1e-5).all(axis=1).any() for row in start("vocabulary"))
    assert start("normal").std() == pytest.approx(read.std(), rel=0.05)


def written(pair, settings, tree, directory: Path) -> Path:
    directory.mkdir()
    write_peft(to_peft(settings, tree, pair.student.config, str(pair.directory)), directory)
    return directory


@pytest.mark.parametrize(
    ("methods", "options"),
    [
        (("lora",), {}),
        (("lora",), {"lora.rslora": True, "lora.alpha": 2.5, "lora.rank": 3, "lora.targets": ("k_proj", "up_proj")}),
        (("prefix",), {"prefix.reparametrize": False}),
        (("prefix",), {"prefix.reparametrize": True}),
        (("prompt",), {}),
        (("lora", "prefix"), {}),
    ],
)
def test_ours_to_peft_to_ours_is_equal_bit_for_bit(llama, tmp_path, methods, options):
    settings, tree = made_here(llama, methods, **options)
    again, read = llama.ours(written(llama, settings, tree, tmp_path / "peft"))
    if "prefix" in tree:  # PEFT knows what the reparametrisation puts out, not what it is made of
        tree = {**tree, "prefix": adapters.adapter_inputs(settings, tree, llama.student.config).prefix}
    jax.tree.map(np.testing.assert_array_equal, read, tree)
    assert again.methods == methods
    if "lora" in methods:
        for key in ("rank", "alpha", "rslora"):
            assert again.lora[key] == settings.lora[key]
        assert set(again.lora.targets) == set(tree["lora"])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_lora_beside_a_soft_prompt_is_two_adapters(llama, tmp_path, method):
    """PEFT puts the second on a model into which the first is merged, as the model card says."""
    settings, tree = made_here(llama, ("lora", method), **{"lora.rank": 2})
    folder = written(llama, settings, tree, tmp_path / "both")
    assert sorted(path.name for path in folder.iterdir()) == sorted(["lora", method])
    merged = llama.theirs(folder / "lora").merge_and_unload()
    model = peft.PeftModel.from_pretrained(merged, folder / method).eval()
    np.testing.assert_allclose(llama.logits(settings, tree), their_logits(model), atol=2e-4)
    assert llama.generated(settings, tree) == their_texts(model)


def test_targets_mean_no_layer_that_is_not_adapted(llama):
    """Short names where they say enough; an expression where a short one would also mean another layer."""
    settings, tree = made_here(llama, ("lora",), **{"lora.targets": ("q_proj", "down_proj")})
    files = to_peft(settings, tree, llama.student.config, "")
    assert files["lora"].config["target_modules"] == ["down_proj", "q_proj"]
    known = {"encoder_q": ("encoder.0.q", "encoder.1.q"), "decoder_q": ("decoder.0.q",), "v": ("encoder.0.v",)}
    assert _targets({"encoder_q": 0, "v": 0}, known, False) == r"encoder\.\d+\.q|encoder\.0\.v"
    assert _targets({"encoder_q": 0, "decoder_q": 0}, known, False) == ["q"]


def test_modules_are_those_of_transformers(pair):
    linear = {name for name, module in pair.reference().named_modules() if isinstance(module, torch.nn.Linear)}
    ours = [module for layers in lora_modules(pair.student.config).values() for module in layers]
    assert {*ours, "lm_head"} == {*linear, "lm_head"} and len(set(ours)) == len(ours)


def test_merged_models_are_those_of_transformers(pair, tmp_path):
    """LoRA merged into the weights, written, and loaded by transformers: PEFT's own logits with the adapter."""
    made = pair.theirs(pair.save(pair.config("lora"), tmp_path / "made"))
    settings, tree = pair.ours(tmp_path / "made")
    merged = adapters.merge(settings, tree, pair.student.params, pair.student.config)
    save_safetensors(merged, pair.student.config, tmp_path / "merged")
    auto = transformers.AutoModelForSeq2SeqLM if pair.encodes else transformers.AutoModelForCausalLM
    np.testing.assert_allclose(
        their_logits(auto.from_pretrained(tmp_path / "merged").eval()), their_logits(made), atol=1e-4
    )


@pytest.mark.parametrize(
    ("tree", "words"),
    [({"full": {}}, "--format hf"), ({"prefix": {}, "prompt": {}}, "prefix and a prompt"), ({}, "bare student")],
)
def test_what_peft_cannot_hold_is_refused(llama, tree, words):
    with pytest.raises(UserError, match=words):
        to_peft(default().adapter, tree, llama.student.config, "")


# ---- what is wrong with files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LoRA and a prefix of PEFT, for a llama."""
    root = tmp_path_factory.mktemp("saved")
    pair = Pair("llama", root / "model")
    for method in ("lora", "prefix"):
        pair.save(pair.config(method), root / method)
    return root, pair.student.config


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def changed_config(**change):
    def apply(folder):
        file = folder / "adapter_config.json"
        raw = {**json.loads(file.read_text()), **change}
        file.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))

    return apply


def changed_tensors(**change):
    def apply(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, value in change.items():
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FAULTS = [
    ("lora", changed_config(peft_type="IA3"), ["'IA3' is not supported", "LORA, PREFIX_TUNING, PROMPT_TUNING"]),
    ("lora", changed_config(use_dora=True), ["use_dora = True is not supported"]),
    ("lora", changed_config(modules_to_save=["lm_head"]), ["modules_to_save = ['lm_head'] is not supported"]),
    ("lora", changed_config(bias="lora_only"), ["bias = 'lora_only'"]),
    ("lora", changed_config(option_of_tomorrow={"x": 1}), ["option_of_tomorrow"]),
    ("lora", changed_config(init_lora_weights="pissa_niter_4"), ["pissa_niter_4", "path_initial_model"]),
    ("lora", changed_config(target_modules=["q_proj", "query"]), ["'query'", "it has q_proj, k_proj"]),
    ("lora", changed_config(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"]), ["'lm_head'"]),
    ("lora", changed_config(target_modules=r".*\.query"), [r".query'", "it has q_proj"]),
    ("lora", changed_config(target_modules=[]), ["target_modules is empty"]),
    ("lora", changed_config(target_modules="(q_proj"), ["save the adapter again"]),
    ("lora", changed_config(target_modules=None), ["save the adapter again"]),
    ("lora", changed_config(layers_to_transform=[7]), ["leave no module"]),
    ("lora", changed_config(r="absent"), ["KeyError: 'r'"]),
    ("lora", changed_config(r=0, rank_pattern={}), ["adapter"]),
    ("lora", changed_config(lora_alpha="high"), ["save the adapter again"]),
    ("lora", changed_config(r=8), [f"{A.replace('1', '0', 1)} has shape (4, 48)", "needs (8, 48)"]),
    ("lora", changed_config(target_modules=["q_proj", "v_proj"]), ["mlp.down_proj.lora_A.weight (and 5 more)", "another base"]),
    ("lora", changed_config(target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]), ["up_proj.lora_A.weight (4, 48) is missing"]),
    ("lora", changed_tensors(**{A: None}), [f"{A} (4, 48) is missing"]),
    ("lora", changed_tensors(**{A: np.zeros((4, 64), np.float32)}), [f"{A} has shape (4, 64)", "needs (4, 48)", "another base"]),
    ("lora", changed_tensors(**{A.replace("1", "3"): np.zeros((4, 48), np.float32)}), [A.replace("1", "3"), "another base"]),
    ("lora", changed_tensors(**{A: np.zeros((4, 48), np.int8)}), [A, "stored as I8"]),
    ("lora", cut, ["adapter_model.safetensors", "cut off"]),
    ("lora", pickled, ["adapter_model.bin is pickled", "save it again"]),
    ("lora", lambda folder: (folder / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors: not found"]),
    ("lora", lambda folder: (folder / "adapter_config.json").unlink(), ["holds no adapter_config.json"]),
    ("lora", lambda folder: (folder / "adapter_config.json").write_text("{"), ["not valid JSON"]),
    ("lora", lambda folder: (folder / "adapter_config.json").write_text("[]"), ["not a JSON object"]),
    ("prefix", changed_config(num_virtual_tokens=6), ["prompt_embeddings has shape (5, 144)", "needs (6, 144)"]),
    ("prefix", changed_config(num_virtual_tokens="absent"), ["num_virtual_tokens"]),
    ("prefix", changed_config(num_transformer_submodules=2), ["num_transformer_submodules is 2"]),
    ("prefix", changed_config(peft_type="PROMPT_TUNING"), ["shape (5, 144)", "needs (5, 48)"]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "damage", "words"), FAULTS)
def test_what_does_not_fit_is_named(saved, tmp_path, method, damage, words):
    root, student = saved
    folder = Path(shutil.copytree(root / method, tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(UserError) as caught:
        read_peft(folder, student)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(folder), *words)), message


def test_two_adapters_of_one_method_are_not_mixed(saved, tmp_path):
    root, student = saved
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(root / "lora", tmp_path / name)
    with pytest.raises(UserError, match="two adapters for lora"):
        read_peft(tmp_path, student)


def test_the_fingerprint_is_that_of_the_content(saved, tmp_path):
    root, student = saved
    folder = Path(shutil.copytree(root / "lora", tmp_path / "elsewhere"))
    before = read_peft(root / "lora", student).fingerprint
    assert read_peft(folder, student).fingerprint == before
    changed_tensors(**{A: np.ones((4, 48), np.float32)})(folder)
    assert read_peft(folder, student).fingerprint != before
