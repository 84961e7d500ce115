"""Adapters of students that see, held against PyTorch: LoRA of both halves, prefixes and prompts beside pictures."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from sqa_jax import adapters
from sqa_jax.adapters.lora import adaptable
from sqa_jax.adapters.nearest import nearest
from sqa_jax.adapters.peft_format import lora_modules, to_peft, write_peft
from sqa_jax.adapters.peft_read import read_peft
from sqa_jax.batches.config_data import encoder_for
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.loader import pack_sequences
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.checkpoints.weights import param_shapes, random_params, save_safetensors
from sqa_jax.config import default
from sqa_jax.data.images import load_images
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.export import export
from sqa_jax.inference.generate import Generator
from sqa_jax.models.api import extra_model_inputs
from sqa_jax.models.catalogue import CATALOGUE, SHAPES
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.params import vision_linear_layers
from sqa_jax.models.segments import PREFIX_LM
from sqa_jax.models.soft_tokens import SoftPromptTokens
from sqa_jax.models.vision.image_input import ImageInputs
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.parallel.rules import shardings
from sqa_jax.prompts.encode import Encoder
from sqa_jax.prompts.formats import Format
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.reporting.model_card import example, model_card
from sqa_jax.runtime import Runtime, make_decoder
from sqa_jax.training.loop import train
from sqa_jax.training.loss import row_losses
from tests.support.vision_pair import VisionPair, png, problem
from tests.test_export import card_of, ran
from tests.test_train import last_adapter, tiny_config

WORD = 7  # stands for a soft prompt's tokens where transformers wants to see ids
TARGET = 5  # tokens at the end that are a target


@pytest.fixture(scope="module", params=["paligemma2", "smolvlm", "qwen2_vl"])
def pair(request, tmp_path_factory):
    """A pair with `shown`, a question with a picture as `prompt`, encoded, and `ids`, the same with a target behind."""
    own = VisionPair(request.param, tmp_path_factory.mktemp("adapters"))
    own.shown = own.images(tmp_path_factory.mktemp("pictures"), (50, 40))
    encoder = Encoder(own.student.tokenizer, 200, True, True, images=own.shown)
    (own.prompt,) = encoder.encode([problem("0", png(0, (50, 40)))], [Format.parse("QM-A")])
    own.ids = [*own.prompt.tokens, *range(40, 40 + TARGET)]
    return own


def settings_for(*methods, **options):
    settings = default().adapter
    settings.update_from_flattened_dict(
        {
            "methods": methods, "lora.rank": 3, "lora.alpha": 6.0, "prefix.length": 5, "prefix.reparametrize": False,
            "prompt.length": 4, "visual.length": 3,
        } | options
    )  # fmt: skip
    return settings


def shaken(settings, student, base, scale=0.2):
    """A new adapter moved away from its start, so that nothing is zero."""

    def make(base):
        keys = iter(jax.random.split(jax.random.key(9), 200))
        tree = adapters.init_adapter(settings, student, base, 0)
        return jax.tree.map(lambda leaf: leaf + scale * jax.random.normal(next(keys), leaf.shape), tree)

    return jax.jit(make)(base)


def reader(pair, settings):
    """(tree, base, ids) → logits [T, V], of ids that may hold a soft prompt's."""
    config = pair.student.config
    decoder = Decoder(config)

    def read(tree, base, ids, branches, images):
        adaptation = adapters.adapter_inputs(settings, tree, config)
        places = jnp.arange(ids.shape[1])[None]
        more = extra_model_inputs(decoder, base, adaptation, branches, images)
        arguments = (ids, places, jnp.ones_like(places), adaptation)
        return decoder.apply({"params": base}, *arguments, **more, method="logits")[0][0]

    compiled, rows = jax.jit(read), ImageBatcher(pair.shown)

    def of(tree, ids):
        tokens, images = rows.add_images(np.asarray([ids]), rows.room(rows.count(ids)))
        branches = PREFIX_LM * (np.arange(len(ids)) < len(ids) - TARGET)[None] if config.prefix_lm else None
        return np.asarray(compiled(tree, pair.student.params, tokens, branches, images))

    return of


def theirs(pair, model, ids=None, **more):
    ids = pair.ids if ids is None else ids
    with torch.no_grad():
        return model(**{**pair.theirs(ids, pair.shown, len(ids) - TARGET), **more}).logits[0].numpy()


def loaded(pair, directory):
    """An adapter as PEFT loads it, with each of its tensors in the file and each of the file's in it."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.model), directory).eval()
    if model.active_peft_config.peft_type == "LORA":
        tensors = peft.utils.load_peft_weights(directory, device="cpu")
        result = peft.set_peft_model_state_dict(model, tensors)
        assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
        assert len(tensors) == sum("lora_" in name for name, _ in model.named_parameters())
    return model


def written(pair, settings, tree, directory):
    directory.mkdir()
    write_peft(to_peft(settings, tree, pair.student.config, str(pair.path)), directory)
    return directory


def test_layers_are_those_of_transformers(pair):
    linear = {name for name, module in pair.model.named_modules() if isinstance(module, torch.nn.Linear)}
    ours = [module for layers in lora_modules(pair.student.config).values() for module in layers]
    assert {*ours, "lm_head"} == linear and len(ours) == len(linear) - 1


def test_lora_of_all_linear_layers(pair, tmp_path):
    """PEFT's "all-linear" means tower and connector, too: read, written and read again, logits are PEFT's."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 2, "qkv": 3}
    )
    model = peft.get_peft_model(copy.deepcopy(pair.model), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "made")
    expected, bare = theirs(pair, model), theirs(pair, pair.model)
    assert np.abs(expected - bare).max() > 0.1
    read, settings = read_peft(tmp_path / "made", pair.student.config), default().adapter
    settings.update_from_flattened_dict(read.settings)
    assert settings.lora.vision_encoder and set(read.tree["lora"]) == set(adaptable(pair.student.config))
    np.testing.assert_allclose(reader(pair, settings)(read.tree, pair.ids), expected, atol=1e-3)
    again = loaded(pair, written(pair, settings, read.tree, tmp_path / "again"))
    np.testing.assert_allclose(theirs(pair, again), expected, atol=1e-4)
    # The merged model, saved and loaded by transformers, is the same one.
    merged = adapters.merge(settings, read.tree, pair.student.params, pair.student.config)
    save_safetensors(merged, pair.student.config, tmp_path / "merged")
    whole = type(pair.model).from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(theirs(pair, whole), expected, atol=1e-3)


def test_lora_of_the_language_half(pair, tmp_path):
    """A tower's layers have the same names; PEFT adapts none of them."""
    student = pair.student
    settings = settings_for("lora", **{"lora.targets": ("q_proj", "v_proj", "down_proj")})
    tree = shaken(settings, student.config, student.params)
    model = loaded(pair, written(pair, settings, tree, tmp_path / "peft"))
    adapted = {name.removeprefix("base_model.model.").split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}  # fmt: skip
    known = lora_modules(student.config)
    assert adapted == {module for name in tree["lora"] for module in known[name]} and len(tree["lora"]) == 3
    np.testing.assert_allclose(reader(pair, settings)(tree, pair.ids), theirs(pair, model), atol=1e-3)
    read = read_peft(tmp_path / "peft", student.config)
    assert not read.settings["lora.vision_encoder"]
    jax.tree.map(np.testing.assert_array_equal, read.tree, tree)


def test_older_releases_spelled_modules_otherwise(pair, tmp_path):
    """Files of transformers before 4.52, and between 4.52 and 5."""
    student = pair.student
    older = {
        "qwen2_vl": [{"model.language_model.": "model.", "model.visual.": "visual."}],
        "smolvlm": [{}],
    }.get(pair.family) or [
        {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
        {"model.vision_tower.": "model.vision_tower.vision_model."},
    ]
    settings = settings_for("lora", **{"lora.vision_encoder": True})
    tree = shaken(settings, student.config, student.params)
    ends = {module.rpartition(".")[2] for layers in lora_modules(student.config).values() for module in layers}
    for number, spelling in enumerate(older):
        folder = written(pair, settings, tree, tmp_path / str(number))
        tensors, front = load_file(folder / "adapter_model.safetensors"), "base_model.model."
        for new, old in spelling.items():
            tensors = {key.replace(front + new, front + old): value for key, value in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        raw = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**raw, "target_modules": sorted(ends)}))
        jax.tree.map(np.testing.assert_array_equal, read_peft(folder, student.config).tree, tree)


def positions_for(pair, ids, shift):
    """Explicit positions of ids behind `shift` others, as the model counts them."""
    if pair.family != "qwen2_vl":
        return torch.arange(len(ids))[None] + shift + pair.family.startswith("paligemma")
    pair.model.model.rope_deltas = None
    arguments = pair.theirs(ids, pair.shown, 0)
    arguments.pop("pixel_values", None)
    return pair.model.model.get_rope_index(**arguments)[0] + shift


def test_prefix(pair, tmp_path):
    """Keys and values in front of pictures and text, and positions behind them, pictures' included."""
    student, config = pair.student, pair.student.config
    settings = settings_for("prefix")
    tree = shaken(settings, config, student.params)
    cache = transformers.DynamicCache(config=pair.model.config)
    for layer in range(config.num_layers):
        heads = (1, 5, config.num_kv_heads, config.head_dim)
        key, value = (torch.tensor(np.array(tree["prefix"][name][layer])) for name in ("key", "value"))
        cache.update(key.reshape(heads).transpose(1, 2), value.reshape(heads).transpose(1, 2), layer)
    types = pair.theirs(pair.ids, pair.shown, len(pair.ids) - TARGET).get("token_type_ids")
    # They count from the cache's beginning; the prefix is seen from everywhere in any case.
    types = {} if types is None else {"token_type_ids": torch.nn.functional.pad(types, (5, 0), value=1)}
    expected = theirs(
        pair, pair.model, **types, past_key_values=cache, position_ids=positions_for(pair, pair.ids, 5),
        attention_mask=torch.ones(1, 5 + len(pair.ids), dtype=torch.long),
    )  # fmt: skip
    assert np.abs(expected - theirs(pair, pair.model)).max() > 1e-2
    np.testing.assert_allclose(reader(pair, settings)(tree, pair.ids), expected, atol=1e-3)
    folder = written(pair, settings, tree, tmp_path / "peft")
    model = loaded(pair, folder)
    if pair.family == "smolvlm":  # elsewhere PEFT leaves out what positions or masks depend on
        np.testing.assert_allclose(theirs(pair, model), expected, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, read_peft(folder, config).tree, tree)


def test_prompt_in_front_of_a_picture_and_behind_it(pair, tmp_path):
    """What the encoder, the packing and the student make of a prompt's place, against the embeddings put there by hand."""
    student, config = pair.student, pair.student.config
    settings = settings_for("prompt")
    tree = shaken(settings, config, student.params)
    trained, read = torch.tensor(np.array(tree["prompt"]["embedding"])), reader(pair, settings)
    for behind in (False, True):
        ids = SoftPromptTokens(4, behind).put(pair.ids, pair.prompt.image_end)
        features = [place for place, token in enumerate(ids) if token >= config.vocab_size]
        virtual = [place for place, token in enumerate(ids) if token < 0]
        assert virtual[0] > features[-1] if behind else virtual == [0, 1, 2, 3]
        stand_in = [WORD if token < 0 else token for token in ids]
        arguments = pair.theirs(stand_in, pair.shown, len(ids) - TARGET)
        words = pair.model.get_input_embeddings()(arguments.pop("input_ids")).detach().clone()
        words[0, virtual] = trained
        arguments.pop("mm_token_type_ids", None)
        with torch.no_grad():
            expected = pair.model(
                **arguments, inputs_embeds=words, position_ids=positions_for(pair, stand_in, 0)
            ).logits[0]
        np.testing.assert_allclose(read(tree, ids), expected, atol=1e-3)
        if pair.family == "smolvlm" and not behind:
            model = loaded(pair, written(pair, settings, tree, tmp_path / "peft"))
            np.testing.assert_allclose(theirs(pair, model), expected, atol=1e-4)
    settings.prompt.after_image = True
    with pytest.raises(UserError, match="in front of the picture"):
        to_peft(settings, tree, config, "")


def test_prompts_start_as_peft_starts_them(pair):
    """From a text that is shorter, and one that is longer than the prompt."""
    student = pair.student
    for text in ("ab", "look at the picture"):
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(pair.path),
        )  # fmt: skip
        expected = peft.get_peft_model(copy.deepcopy(pair.model), config).prompt_encoder["default"].embedding.weight
        settings = settings_for("prompt", **{"prompt.length": 5, "prompt.init": "text", "prompt.text": text})
        words = adapters.prompt_text_tokens(settings, student.tokenizer)
        tree = adapters.init_adapter(settings, student.config, student.params, 0, words)
        np.testing.assert_allclose(tree["prompt"]["embedding"], expected.detach(), rtol=1e-6)


# ---- what does not depend on a reference


@pytest.mark.parametrize(
    ("init", "words"), [("text", "is text, but config.adapter.prompt.text is empty"), ("words", "choose one of")]
)
def test_impossible_starts_are_refused(init, words):
    settings = settings_for("prompt", **{"prompt.init": init})
    student = SHAPES["smolvlm-tiny"]
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda base: adapters.init_adapter(settings, student, base, 0), param_shapes(student))


def test_an_earlier_study_s_prefix_loads(tmp_path):
    """PEFT's files for Qwen2-VL-2B: 50 positions of 28 layers with 2 key/value heads of 128."""
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 50, "num_layers": 28, "token_dim": 256,
        "num_attention_heads": 2, "num_transformer_submodules": 1, "encoder_hidden_size": 256, "prefix_projection": False,
        "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "inference_mode": True, "auto_mapping": None, "revision": None,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    flat = np.random.default_rng(0).normal(size=(50, 14336)).astype(np.float32)
    save_file({"prompt_embeddings": flat}, tmp_path / "adapter_model.safetensors")
    read = read_peft(tmp_path, CATALOGUE["qwen2-vl-2b"].config)
    prefix = read.tree["prefix"]
    assert prefix["key"].shape == prefix["value"].shape == (28, 50, 256)
    as_peft = flat.reshape(50, 28 * 2, 2, 128)  # of layer i keys are 2 i, values 2 i + 1
    np.testing.assert_array_equal(prefix["value"][27].reshape(50, 2, 128), as_peft[:, 55])
    settings = default().adapter
    settings.update_from_flattened_dict(read.settings)
    (again,) = to_peft(settings, read.tree, CATALOGUE["qwen2-vl-2b"].config, "").values()
    np.testing.assert_array_equal(again.tensors["prompt_embeddings"], flat)


@pytest.mark.parametrize(("methods", "tower"), [(("visual",), False), (("lora",), True)])
def test_students_of_text_have_no_tower(tiny_student, methods, tower):
    settings = settings_for(*methods, **{"lora.vision_encoder": tower})
    with pytest.raises(UserError, match="text alone"):
        adapters.init_adapter(settings, tiny_student.config, tiny_student.params, 0)


def test_published_towers_have_names_of_their_own():
    """No two layers of a student are called alike in an adapter's tree."""
    for name in ("paligemma2-3b", "smolvlm-256m", "qwen2-vl-2b"):
        student = CATALOGUE[name].config
        found = vision_linear_layers(student)
        assert all(layer.startswith("vision.") for layer in found)
        assert sum(len(leaf.names) for leaf in found.values()) == {"paligemma2-3b": 27 * 6 + 1, "smolvlm-256m": 12 * 6 + 1, "qwen2-vl-2b": 32 * 4 + 2}[name]  # fmt: skip


# ---- deep prompts, and adapters of a tower in training


@pytest.fixture(scope="module", params=["smolvlm-tiny", "qwen2-vl-tiny"])
def batch_of(request, tmp_path_factory):
    """(student, a packed row with a picture) of each kind of tower."""
    student = load_student(f"random:{request.param}")
    images = load_images(tmp_path_factory.mktemp("pictures"), student.config.vision, student.config.vocab_size, [problem("0", png(0, (50, 40)))])  # fmt: skip
    prompt = [*images.prompt_ids("0", student.tokenizer), *range(10, 20)]
    rows = pack_sequences(
        [[*prompt, 30, 31, 32]], np.array([len(prompt)]), ["0"], 128, 0, 0, False, ImageBatcher(images)
    )
    return student, jax.tree.map(lambda array: jnp.asarray(array)[None], rows[0])


def test_deep_prompts_alone_lower_the_loss(batch_of):
    """Every prompt of every layer has a gradient, and a step along it helps."""
    student, batch = batch_of
    settings, decoder = settings_for("visual"), Decoder(student.config)
    tree = adapters.init_adapter(settings, student.config, student.params, 0)
    layers, width, patch = student.config.vision.encoder_shape
    found, bound = tree["visual"]["embedding"], (6 / (3 * patch**2 + width)) ** 0.5
    assert found.shape == (layers, 3, width) and 0.9 * bound < jnp.abs(found).max() <= bound

    @jax.jit
    def loss(tree, base, batch):
        return jax.value_and_grad(lambda tree: row_losses(settings, decoder, tree, base, batch, None).sum())(tree)

    before, gradient = loss(tree, student.params, batch)
    assert np.all(np.abs(gradient["visual"]["embedding"]).max(axis=-1) > 0)
    length = optax.global_norm(gradient)
    moved = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope / length, tree, gradient)
    assert loss(moved, student.params, batch)[0] < before


def test_lora_s_dropout_reaches_the_tower(batch_of):
    """Of layers that the language half does not have."""
    student, batch = batch_of
    settings = settings_for("lora", **{"lora.vision_encoder": True, "lora.targets": ("fc1",), "lora.dropout": 0.5})
    tree = shaken(settings, student.config, student.params)
    decoder = Decoder(student.config, lora_dropout=0.5)
    loss = jax.jit(lambda key, tree, base, batch: row_losses(settings, decoder, tree, base, batch, key))
    one, same, other = (loss(jax.random.key(seed), tree, student.params, batch) for seed in (0, 0, 1))
    assert one == same and one != other


def test_features_of_the_bare_tower_are_not_taken_for_the_adapted_one_s(batch_of):
    student, batch = batch_of
    tree = adapters.init_adapter(settings_for("visual"), student.config, student.params, 0)
    known = batch._replace(images=ImageInputs(features=jnp.zeros((1, 8, student.config.hidden_size))))
    with pytest.raises(ValueError, match="bare tower"):
        row_losses(settings_for("visual"), Decoder(student.config), tree, student.params, known, None)


def test_nearest_words():
    """A vector's own row is nearest, whatever its length; rows of no length are near to nothing."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(40, 16)).astype(np.float32)
    table[3] = 0
    rows, cosines = nearest(jnp.asarray(table[[5, 9]] * [[7.0], [0.01]]), jnp.asarray(table), 3)
    np.testing.assert_array_equal(rows[:, 0], [5, 9])
    expected = table @ table[5] / np.maximum(np.linalg.norm(table, axis=1), 1e-30) / np.linalg.norm(table[5])
    np.testing.assert_allclose(cosines[0], np.sort(expected)[::-1][:3], atol=1e-5)


def test_all_methods_of_a_tower_train_and_answer(tmp_path, capsys):
    """Deep prompts, LoRA of both halves and a prompt from words; training scores options, evaluation writes."""
    config = tiny_config(
        tmp_path,
        **{
            "student.path": "random:smolvlm-tiny", "adapter.methods": ("lora", "prompt", "visual"), "adapter.lora.vision_encoder": True,
            "adapter.lora.rank": 2, "adapter.prompt.length": 4, "adapter.prompt.init": "text", "adapter.prompt.text": "look",
            "adapter.prompt.after_image": True, "data.train_limit": 12, "train.steps": 2, "train.eval_every": 0,
            "eval.val_limit": 2, "eval.limit": 3, "eval.max_new_tokens": 4, "eval.mode": "generate",
            "eval.checkpoint": "last",
        },
    )  # fmt: skip
    mesh, student = make_mesh(default().mesh, jax.devices()[:1]), load_student("random:smolvlm-tiny")
    runtime = Runtime(mesh, student, make_decoder(config, student.config, mesh))
    train(config, str(tmp_path / "run"), runtime)
    _, state = last_adapter(tmp_path / "run", config)
    words = adapters.prompt_text_tokens(config.adapter, student.tokenizer)
    new = adapters.init_adapter(config.adapter, student.config, student.params, config.seed, words)
    assert all(np.abs(state["adapter"]["visual"]["embedding"] - new["visual"]["embedding"]).max(axis=(1, 2)) > 0)
    assert all(np.any(state["adapter"]["lora"][f"vision.{name}"]["b"]) for name in ("fc2", "projector"))
    assert not list((tmp_path / "datasets").glob("features-*"))
    words = json.loads((tmp_path / "run/prompt.json").read_text())
    assert [own[0]["text"] for own in words] == list("look") and "nearest words" in capsys.readouterr().out
    assert evaluate(config, str(tmp_path / "run"), runtime)["n"]["AVG"] == 3


@pytest.mark.parametrize("name", ["paligemma2-3b", "smolvlm-256m", "qwen2-vl-2b"])
def test_every_adapter_of_a_published_tower_has_its_place_on_a_mesh(name):
    student, mesh = CATALOGUE[name].config, make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    settings = settings_for("lora", "prompt", "prefix", "visual", **{"lora.vision_encoder": True})
    tree = jax.eval_shape(lambda base: adapters.init_adapter(settings, student, base, 0), param_shapes(student))
    placed = shardings(tree, mesh)
    assert placed["visual"]["embedding"].is_fully_replicated
    assert not placed["lora"]["q_proj"]["a"].is_fully_replicated


# ---- the export verb


@pytest.fixture(scope="module", params=["idefics3", "paligemma"])
def published(request, tmp_path_factory):
    """(configuration, student, adapter) of a directory as a hub has them, and an adapter of PEFT of both halves."""
    root = tmp_path_factory.mktemp("published")
    shape = SHAPES["paligemma-tiny" if request.param == "paligemma" else "smolvlm-tiny"]
    if request.param == "idefics3":  # as the published SmolVLM of 256M and 500M are
        shape = dataclasses.replace(shape, vision=dataclasses.replace(shape.vision, family="idefics3"))
    save_safetensors(random_params(shape, 0), shape, root / "base")
    tokenizer = byte_tokenizer(shape.vision)
    if request.param == "paligemma":
        tokenizer.bos_token, tokenizer.add_bos_token = "<|endoftext|>", True
    tokenizer.save_pretrained(root / "base")
    student = load_student(str(root / "base"))
    settings = settings_for("lora", **{"lora.targets": ("q_proj", "fc1", "projector"), "lora.vision_encoder": True})
    tree = shaken(settings, student.config, student.params)
    (root / "adapter").mkdir()
    write_peft(to_peft(settings, tree, student.config, str(root / "base")), root / "adapter")
    config = tiny_config(
        root,
        **{"student.path": str(root / "base"), "adapter.peft": str(root / "adapter"), "eval.checkpoint": "none", "eval.max_new_tokens": 6},
    )  # fmt: skip
    return config, student, settings, tree, root


def test_exports_answer_as_the_student(published):
    """What a card's snippet prints, with transformers' processor and model, and PEFT's adapter or merged weights."""
    config, student, settings, tree, root = published
    shown = example(student)
    images = load_images(root, student.config.vision, student.config.vocab_size, [shown])
    (prompt,) = encoder_for(config, student.tokenizer, images).encode([shown], [arm_format(config.recipe)])
    mesh = make_mesh(default().mesh, jax.devices()[:1])
    generator = Generator(settings, Decoder(student.config), mesh, student.eos_ids, 6, 1, images=ImageBatcher(images))  # fmt: skip
    ((_, ids),) = generator(tree, student.params, [prompt.tokens])
    for kind in ("peft", "hf"):
        out = root / kind
        export(config, str(root), kind, str(out))
        front, text, code = card_of(out)
        assert front["pipeline_tag"] == "image-text-to-text" and "tower and connector included" in text
        assert ran(code)[0] == student.tokenizer.decode(ids, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("source", ["sample", "image-questions", "image-questions-shifted", "dir", "hub"])
def test_cards_name_the_data_of_every_source(published, source):
    config, student, _, _, root = published
    config = config.copy_and_resolve_references()
    config.data.source = source
    card = model_card(config, student, ("lora",), 3, "hf", str(root), {})
    embedded = source not in ("dir", "hub")
    assert ("that sqa_jax makes" in card) == ("apache-2.0" in card) == embedded
    assert ("CC BY-NC-SA 4.0" in card) == (not embedded)


def test_soft_prompts_that_peft_reads_otherwise_say_so(published):
    config, student, _, _, root = published
    card = model_card(config, student, ("prompt",), None, "peft", str(root), {})
    assert ("answers otherwise" in card) == (student.config.vision.placeholder == "")
