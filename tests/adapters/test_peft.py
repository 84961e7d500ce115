"""Adapters to and from PEFT's files, compared with PEFT itself: logits, greedy texts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sqa_jax import adapters
from sqa_jax.adapters.peft_format import _targets, lora_modules, prefix_layers_in_file, to_peft, write_peft
from sqa_jax.adapters.peft_read import read_peft
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.weights import save_safetensors
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.decoder import Decoder
from tests.support.peft_pair import (
    COLUMNS,
    METHODS,
    PARTIAL_LORA,
    TOKENS,
    Pair,
    padded,
    peft_files,
    peft_logits,
    peft_texts,
)
from tests.support.torch_models import ENCODER_DECODERS, FAMILIES, torch_model


@pytest.fixture(scope="module", params=FAMILIES | ENCODER_DECODERS)
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Pair:
    """For what does not depend on the family."""
    return Pair("llama", tmp_path_factory.mktemp("llama") / "model")


def written(pair, settings, tree, directory: Path) -> Path:
    """The adapter in PEFT's files, as we write them."""
    directory.mkdir()
    write_peft(to_peft(settings, tree, pair.student.config, str(pair.directory)), directory)
    return directory


@pytest.mark.parametrize("method", METHODS)
def test_read_adapters_give_the_logits_and_texts_of_peft(pair, reference, method):
    settings, tree = pair.read(pair.adapter(reference, method))
    expected = pair.expected(reference, method)
    np.testing.assert_allclose(pair.logits(settings, tree)[..., COLUMNS], expected["logits"], atol=1e-4)
    assert not np.array_equal(expected["texts"], expected["base_texts"])
    if method != "projected prefix":  # which is read as a prefix without projection
        np.testing.assert_array_equal(padded(pair.generated(settings, tree)), expected["texts"])


@pytest.mark.parametrize("method", METHODS)
def test_written_adapters_have_the_tensors_of_peft(pair, reference, tmp_path, method):
    """Bit for bit those that were read, where PEFT uses them."""
    original = pair.adapter(reference, method)
    folder = written(pair, *pair.read(original), tmp_path / "again")
    ours, theirs = load_file(folder / "adapter_model.safetensors"), load_file(original / "adapter_model.safetensors")
    if pair.is_encoder_decoder and method == "prompt":  # the decoder's rows are not used
        theirs = {key: values * (np.arange(6) < 3)[:, None] for key, values in theirs.items()}
    elif pair.is_encoder_decoder and "prefix" in method:  # layers that no layer of the decoder looks up
        used = np.isin(np.arange(2), prefix_layers_in_file(pair.student.config))
        theirs = {key: values * np.repeat(used, values.shape[1] // 2) for key, values in theirs.items()}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    config, raw = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, original))
    known = config.keys() - {
        "base_model_name_or_path",
        "num_attention_heads",
        "num_layers",
        "token_dim",
        "prefix_projection",
    }
    assert {key: config[key] for key in known & raw.keys()} == {key: raw[key] for key in known & raw.keys()}


@pytest.mark.live
@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_written_adapters(pair, reference, tmp_path, method):
    expected = pair.expected(reference, method)
    model = pair.peft_model(written(pair, *pair.read(pair.adapter(reference, method)), tmp_path / "again"))
    np.testing.assert_allclose(peft_logits(model)[..., COLUMNS], expected["logits"], atol=1e-5)
    np.testing.assert_array_equal(padded(peft_texts(model)), expected["texts"])


LORAS = {
    "rank-stabilised": dict(use_rslora=True),
    "ranks": dict(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}),
    "alphas": dict(alpha_pattern={"self_attn.v_proj": 3, r"layers\.[02]\.self_attn\.q_proj": 1}),
    "all-at-once": dict(use_rslora=True, rank_pattern={r".*\.0\..*_proj": 6}, alpha_pattern={"^model.layers.2.mlp.down_proj": 9}),
    "expression": dict(target_modules=r".*\.(1|2)\.self_attn\.[qk]_proj"),
    "all-linear": dict(target_modules="all-linear", r=1, rank_pattern={"k_proj": 2}),
    "some-layers": dict(layers_to_transform=[0, 2], layers_pattern="layers"),
    "one-layer": dict(layers_to_transform=1),
    "excluded": dict(exclude_modules=["layers.0.self_attn.q_proj", "down_proj"]),
    "orthogonal": dict(init_lora_weights="orthogonal"),
}  # fmt: skip


@pytest.mark.parametrize("variant", LORAS)
def test_every_kind_of_lora_is_read(llama, reference, tmp_path, variant):
    def make():
        import peft

        options = dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
        return llama, peft.LoraConfig(task_type="CAUSAL_LM", **options | LORAS[variant])

    folder = peft_files(reference, f"lora-{variant}", make)
    compute = lambda: {"logits": peft_logits(llama.peft_model(folder))[..., COLUMNS]}  # noqa: E731
    expected = reference(f"adapters/lora-{variant}", compute, tolerance=1e-4)
    settings, tree = llama.read(folder)
    np.testing.assert_allclose(llama.logits(settings, tree)[..., COLUMNS], expected["logits"], atol=1e-4)
    # PEFT saves "all-linear" as the list of the modules that it found; a file written by hand may have the words.
    if variant == "all-linear":
        shutil.copytree(folder, tmp_path / "copy")
        changed_config(target_modules="all-linear")(tmp_path / "copy")
        jax.tree.map(np.testing.assert_array_equal, llama.read(tmp_path / "copy")[1], tree)


def test_padding_in_rank_and_layers_has_no_gradient(llama, reference):
    def make():
        import peft

        return llama, peft.LoraConfig(**PARTIAL_LORA)

    settings, tree = llama.read(peft_files(reference, "lora-partial", make))
    student, weights = llama.student.config, jax.tree.map(jnp.asarray, tree)
    tokens, positions = jnp.asarray(TOKENS), jnp.tile(jnp.arange(TOKENS.shape[1]), (2, 1))

    def loss(tree):
        adaptation = adapters.adapter_inputs(settings, tree, student)
        out, _ = Decoder(student).apply({"params": llama.student.params}, tokens, positions, jnp.ones_like(tokens), adaptation, method="logits")  # fmt: skip
        return jnp.square(out).mean()

    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(weights)["lora"])
    for name, layer in tree["lora"].items():
        for index in range(student.num_layers):
            rank = 0 if index == 1 else 2 if (name, index) == ("q_proj", 2) else 4
            for values in (layer, gradient[name]):
                assert np.all(values["a"][index, :, :rank] != 0) and np.all(values["b"][index, :rank] != 0)
                assert not values["a"][index, :, rank:].any() and not values["b"][index, rank:].any()


def random_adapter(pair, methods, **options):
    """(settings, tree) of an adapter with random parameters."""
    settings = default().adapter
    settings.methods, settings.prefix.length, settings.prefix.hidden, settings.prompt.length = methods, 5, 24, 3
    settings.update_from_flattened_dict(options)
    shapes = jax.eval_shape(
        lambda base: adapters.init_adapter(settings, pair.student.config, base, 0), pair.student.params
    )
    rng = np.random.default_rng(9)
    return settings, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


def test_soft_prompts_start_from_scaled_embeddings(pair, reference):
    """PEFT's start is the output of the embedding module; Gemma's is √D times the table."""

    def compute() -> dict[str, np.ndarray]:
        import peft
        import torch

        task = "SEQ_2_SEQ_LM" if pair.is_encoder_decoder else "CAUSAL_LM"
        options = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
        model = peft.get_peft_model(torch_model(pair.directory), options)
        with torch.no_grad():
            embeddings = model.word_embeddings(torch.arange(264)).numpy()
        return {"columns": embeddings[:, ::12], "std": embeddings.std()}

    def start(init):
        settings = default().adapter
        settings.methods, settings.prompt.length, settings.prompt.init = ("prompt",), 64, init
        make = jax.jit(lambda base: adapters.init_adapter(settings, pair.student.config, base, 0))
        return np.asarray(make(pair.student.params)["prompt"]["embedding"])

    expected = reference(f"adapters/embeddings-{pair.family}", compute)
    assert all(np.isclose(expected["columns"], row[::12], rtol=1e-5).all(axis=1).any() for row in start("vocabulary"))
    assert start("normal").std() == pytest.approx(float(expected["std"]), rel=0.05)


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
    settings, tree = random_adapter(llama, methods, **options)
    again, read = llama.read(written(llama, settings, tree, tmp_path / "peft"))
    if "prefix" in tree:  # PEFT's file has the output of the reparametrisation
        tree = {**tree, "prefix": adapters.adapter_inputs(settings, tree, llama.student.config).prefix}
    jax.tree.map(np.testing.assert_array_equal, read, tree)
    assert again.methods == methods
    if "lora" in methods:
        for key in ("rank", "alpha", "rslora"):
            assert again.lora[key] == settings.lora[key]
        assert set(again.lora.targets) == set(tree["lora"])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_lora_beside_a_soft_prompt_is_two_adapters(llama, reference, tmp_path, method):
    """PEFT puts the second on a model into which the first is merged, as the model card says."""
    settings, tree = random_adapter(llama, ("lora", method), **{"lora.rank": 2})
    folder = written(llama, settings, tree, tmp_path / "both")
    assert sorted(path.name for path in folder.iterdir()) == sorted(["lora", method])

    def compute() -> dict[str, np.ndarray]:
        import peft

        merged = llama.peft_model(folder / "lora").merge_and_unload()
        model = peft.PeftModel.from_pretrained(merged, folder / method).eval()
        return {"logits": peft_logits(model)[..., COLUMNS], "texts": padded(peft_texts(model))}

    expected = reference(f"adapters/lora-and-{method}", compute, tolerance=1e-4)
    np.testing.assert_allclose(llama.logits(settings, tree)[..., COLUMNS], expected["logits"], atol=2e-4)
    np.testing.assert_array_equal(padded(llama.generated(settings, tree)), expected["texts"])


def test_target_modules_match_no_layer_that_is_not_adapted(llama):
    """Short names where they suffice; an expression where a short one would also match another layer."""
    settings, tree = random_adapter(llama, ("lora",), **{"lora.targets": ("q_proj", "down_proj")})
    files = to_peft(settings, tree, llama.student.config, "")
    assert files["lora"].config["target_modules"] == ["down_proj", "q_proj"]
    known = {"encoder_q": ("encoder.0.q", "encoder.1.q"), "decoder_q": ("decoder.0.q",), "v": ("encoder.0.v",)}
    assert _targets({"encoder_q": 0, "v": 0}, known, False) == r"encoder\.\d+\.q|encoder\.0\.v"
    assert _targets({"encoder_q": 0, "decoder_q": 0}, known, False) == ["q"]


def test_modules_are_those_of_transformers(pair, reference):
    def compute() -> dict[str, np.ndarray]:
        import torch

        modules = torch_model(pair.directory).named_modules()
        return {"linear": np.asarray(sorted(name for name, module in modules if isinstance(module, torch.nn.Linear)))}

    linear = set(reference(f"adapters/modules-{pair.family}", compute)["linear"].tolist())
    ours = [module for layers in lora_modules(pair.student.config).values() for module in layers]
    assert {*ours, "lm_head"} == {*linear, "lm_head"} and len(set(ours)) == len(ours)


def merged(pair, reference, directory: Path) -> Path:
    """The model with PEFT's LoRA merged into its weights, written by us."""
    settings, tree = pair.read(pair.adapter(reference, "lora"))
    model = adapters.merge(settings, tree, pair.student.params, pair.student.config)
    save_safetensors(model, pair.student.config, directory)
    return directory


def test_merged_models_give_the_logits_of_peft(pair, reference, tmp_path):
    """LoRA merged into the weights, written, and read again: PEFT's own logits with the adapter."""
    folder = merged(pair, reference, tmp_path / "merged")
    for file in pair.directory.glob("*token*"):
        shutil.copy(file, folder)
    logits = pair.logits(default().adapter, {}, load_student(str(folder)).params)
    np.testing.assert_allclose(logits[..., COLUMNS], pair.expected(reference, "lora")["logits"], atol=1e-4)


@pytest.mark.live
def test_merged_models_are_read_by_transformers(pair, reference, tmp_path):
    logits = peft_logits(torch_model(merged(pair, reference, tmp_path / "merged")))
    np.testing.assert_allclose(logits[..., COLUMNS], pair.expected(reference, "lora")["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("tree", "message"),
    [({"full": {}}, "--format hf"), ({"prefix": {}, "prompt": {}}, "prefix and a prompt"), ({}, "bare student")],
)
def test_what_peft_cannot_express_is_refused(llama, tree, message):
    with pytest.raises(UserError, match=message):
        to_peft(default().adapter, tree, llama.student.config, "")


# ---- faults in files


@pytest.fixture(scope="module")
def saved(llama, reference):
    """({method: folder} of a LoRA and a prefix of PEFT, their student)."""
    return {method: llama.adapter(reference, method) for method in ("lora", "prefix")}, llama.student.config


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


@pytest.mark.parametrize(("method", "damage", "parts"), FAULTS)
def test_what_does_not_fit_is_named(saved, tmp_path, method, damage, parts):
    folders, student = saved
    folder = Path(shutil.copytree(folders[method], tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(UserError) as caught:
        read_peft(folder, student)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in (str(folder), *parts)), message


def test_two_adapters_of_one_method_are_not_mixed(saved, tmp_path):
    folders, student = saved
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(folders["lora"], tmp_path / name)
    with pytest.raises(UserError, match="two adapters for lora"):
        read_peft(tmp_path, student)


def test_the_fingerprint_is_that_of_the_content(saved, tmp_path):
    folders, student = saved
    folder = Path(shutil.copytree(folders["lora"], tmp_path / "elsewhere"))
    before = read_peft(folders["lora"], student).fingerprint
    assert read_peft(folder, student).fingerprint == before
    changed_tensors(**{A: np.ones((4, 48), np.float32)})(folder)
    assert read_peft(folder, student).fingerprint != before
