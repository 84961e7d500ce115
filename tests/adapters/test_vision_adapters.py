"""Adapters of vision-language models against PEFT: LoRA of vision encoder and decoder, prefixes and prompts with images."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
from tests.support.exported import card_of, run_snippet
from tests.support.runs import last_adapter, tiny_config
from tests.support.torch_models import torch_model
from tests.support.vision_pair import VisionPair, as_bytes, as_text, png, problem, random_array

STAND_IN = 7  # id in place of a soft prompt's tokens where transformers expects ids
TARGET = 5  # tokens at the end that are a target


@pytest.fixture(scope="module", params=["paligemma2", "smolvlm", "qwen2_vl"])
def pair(request, tmp_path_factory):
    """A pair with `shown`, a question with an image as `prompt`, encoded, and `ids`, the same followed by a target."""
    pair = VisionPair(request.param, tmp_path_factory.mktemp("adapters"))
    pair.shown = pair.images(tmp_path_factory.mktemp("images"), (50, 40))
    encoder = Encoder(pair.student.tokenizer, 200, True, True, images=pair.shown)
    (pair.prompt,) = encoder.encode([problem("0", png(0, (50, 40)))], [Format.parse("QM-A")])
    pair.ids = [*pair.prompt.tokens, *range(40, 40 + TARGET)]
    return pair


def settings_for(*methods, **options):
    settings = default().adapter
    settings.update_from_flattened_dict(
        {
            "methods": methods, "lora.rank": 3, "lora.alpha": 6.0, "prefix.length": 5, "prefix.reparametrize": False,
            "prompt.length": 4, "visual.length": 3,
        } | options
    )  # fmt: skip
    return settings


def random_adapter(settings, student, base, spread=0.2):
    """An adapter of random numbers, so that nothing is zero; the same each time."""
    text = (0,)  # the prompt's initial tokens do not change shapes
    shapes = jax.eval_shape(lambda base: adapters.init_adapter(settings, student, base, 0, text), base)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(random_array(jax.tree_util.keystr(path), leaf.shape, spread)), shapes
    )


def sliced(logits) -> np.ndarray:
    """Logits at ten positions, of image, question and target."""
    logits = np.asarray(logits)
    return logits[np.linspace(0, len(logits) - 1, 10).astype(int)]


def logits_of(pair, settings):
    """(tree, ids, params) → `sliced` logits, of ids that may hold a soft prompt's."""
    config = pair.student.config
    decoder = Decoder(config)

    def forward(tree, base, ids, branches, images):
        adaptation = adapters.adapter_inputs(settings, tree, config)
        positions = jnp.arange(ids.shape[1])[None]
        extra_inputs = extra_model_inputs(decoder, base, adaptation, branches, images)
        arguments = (ids, positions, jnp.ones_like(positions), adaptation)
        return decoder.apply({"params": base}, *arguments, **extra_inputs, method="logits")[0][0]

    compiled, batcher = jax.jit(forward), ImageBatcher(pair.shown)

    def logits(tree, ids, params=None):
        capacity = batcher.padded_capacity(batcher.count_features(ids))
        tokens, images = batcher.add_images(np.asarray([ids]), capacity)
        branches = PREFIX_LM * (np.arange(len(ids)) < len(ids) - TARGET)[None] if config.prefix_lm else None
        return sliced(compiled(tree, pair.student.params if params is None else params, tokens, branches, images))

    return logits


def theirs(pair, model, ids=None, **inputs):
    """PyTorch's `sliced` logits."""
    ids = pair.ids if ids is None else ids
    return sliced(pair.logits(ids, pair.shown, len(ids) - TARGET, model, **inputs))


@pytest.fixture(scope="module")
def bare_logits(pair, reference):
    return reference(f"adapters/vision/{pair.family}_bare", lambda: {"logits": theirs(pair, pair.model)}, 1e-4)[
        "logits"
    ]


def loaded(pair, directory):
    """An adapter as PEFT loads it, with each of its tensors in the file and each of the file's in it."""
    import peft

    model = peft.PeftModel.from_pretrained(torch_model(pair.path), directory).eval()
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


def lines(names) -> np.ndarray:
    return as_bytes("\n".join(sorted(names)))


def test_layers_are_those_of_transformers(pair, reference):
    def compute():
        import torch

        return {"names": lines(name for name, m in pair.model.named_modules() if isinstance(m, torch.nn.Linear))}

    linear = as_text(reference(f"adapters/vision/{pair.family}_layers", compute)["names"]).split("\n")
    ours = [module for layers in lora_modules(pair.student.config).values() for module in layers]
    assert {*ours, "lm_head"} == set(linear) and len(ours) == len(linear) - 1


def peft_adapter_of_all_layers(pair, folder) -> dict[str, np.ndarray]:
    """What PEFT saves of an adapter of "all-linear", and its logits; its numbers are `random_array`'s."""
    import peft
    import torch

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 2, "qkv": 3}
    )
    model = peft.get_peft_model(torch_model(pair.path), config).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(model).items()}
    tensors = {name: torch.tensor(random_array(name, shape, 0.2)) for name, shape in shapes.items()}
    assert not peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    model.save_pretrained(folder)
    assert {name: array.shape for name, array in load_file(folder / "adapter_model.safetensors").items()} == shapes
    raw = json.loads((folder / "adapter_config.json").read_text())
    raw |= {"base_model_name_or_path": "", "target_modules": sorted(raw["target_modules"])}
    return {
        "config": as_bytes(json.dumps(raw, sort_keys=True)),
        "tensors": lines(f"{name} {','.join(map(str, shape))}" for name, shape in shapes.items()),
        "logits": theirs(pair, model),
    }


def lora_updates(tensors) -> dict[str, np.ndarray]:
    """{layer: B A / rank} of PEFT's tensors."""
    ends = ".lora_A.weight", ".lora_B.weight"
    layers = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
    pairs = {name: (tensors[name + ends[0]], tensors[name + ends[1]]) for name in layers}
    return {name: b @ a / len(a) for name, (a, b) in pairs.items()}


def test_lora_of_all_linear_layers(pair, bare_logits, reference, tmp_path):
    """PEFT's "all-linear" includes vision encoder and connector: read, written and read again, logits are PEFT's."""
    expected = reference(
        f"adapters/vision/{pair.family}_all_linear", lambda: peft_adapter_of_all_layers(pair, tmp_path / "made"), 1e-4
    )
    shapes = dict(line.split(" ") for line in as_text(expected["tensors"]).split("\n"))
    tensors = {name: random_array(name, tuple(map(int, shape.split(","))), 0.2) for name, shape in shapes.items()}
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text(as_text(expected["config"]))
    save_file(tensors, tmp_path / "peft/adapter_model.safetensors")
    assert np.abs(expected["logits"] - bare_logits).max() > 0.1
    read, settings = read_peft(tmp_path / "peft", pair.student.config), default().adapter
    settings.update_from_flattened_dict(read.settings)
    assert settings.lora.vision_encoder and set(read.tree["lora"]) == set(adaptable(pair.student.config))
    np.testing.assert_allclose(logits_of(pair, settings)(read.tree, pair.ids), expected["logits"], atol=1e-3)
    # Written, it has the same updates of the same layers; the rank is the largest.
    again = written(pair, settings, read.tree, tmp_path / "again")
    saved, updates = load_file(again / "adapter_model.safetensors"), lora_updates(tensors)
    assert saved.keys() == tensors.keys() and updates.keys() == lora_updates(saved).keys()
    for name, update in lora_updates(saved).items():
        np.testing.assert_allclose(update, updates[name], atol=1e-5)
    assert read_peft(again, pair.student.config).settings == read.settings
    # Merged into the weights, it is the same model.
    merged = adapters.merge(settings, read.tree, pair.student.params, pair.student.config)
    bare = logits_of(pair, settings_for("lora"))
    np.testing.assert_allclose(bare({}, pair.ids, merged), expected["logits"], atol=1e-3)


ADAPTERS = {
    "all_linear": settings_for("lora", **{"lora.vision_encoder": True}),
    "language": settings_for("lora", **{"lora.targets": ("q_proj", "v_proj", "down_proj")}),
}


@pytest.mark.live
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_what_is_written(pair, name, tmp_path):
    """And transformers what is merged: their logits are ours."""
    settings = ADAPTERS[name]
    tree = random_adapter(settings, pair.student.config, pair.student.params)
    ours = logits_of(pair, settings)(tree, pair.ids)
    model = loaded(pair, written(pair, settings, tree, tmp_path / "peft"))
    np.testing.assert_allclose(theirs(pair, model), ours, atol=1e-3)
    merged = adapters.merge(settings, tree, pair.student.params, pair.student.config)
    save_safetensors(merged, pair.student.config, tmp_path / "merged")
    np.testing.assert_allclose(theirs(pair, torch_model(tmp_path / "merged")), ours, atol=1e-3)


def test_lora_of_the_language_model(pair, reference, tmp_path):
    """A vision encoder's layers have the same names; PEFT adapts none of them."""
    student, settings = pair.student, ADAPTERS["language"]
    tree = random_adapter(settings, student.config, student.params)
    directory = written(pair, settings, tree, tmp_path / "peft")

    def compute():
        import peft

        model = loaded(pair, directory)
        adapted = (name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A"))
        return {
            "adapted": lines(name.removeprefix("base_model.model.") for name in adapted),
            "tensors": lines(peft.get_peft_model_state_dict(model)),
            "logits": theirs(pair, model),
        }

    expected, known = reference(f"adapters/vision/{pair.family}_language", compute, 1e-4), lora_modules(student.config)
    assert set(as_text(expected["adapted"]).split("\n")) == {module for name in tree["lora"] for module in known[name]}
    assert sorted(load_file(directory / "adapter_model.safetensors")) == as_text(expected["tensors"]).split("\n")
    assert len(tree["lora"]) == 3
    np.testing.assert_allclose(logits_of(pair, settings)(tree, pair.ids), expected["logits"], atol=1e-3)
    read = read_peft(directory, student.config)
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
    settings = ADAPTERS["all_linear"]
    tree = random_adapter(settings, student.config, student.params)
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


def torch_positions(pair, ids, shift):
    """Explicit positions of ids after `shift` others, as the PyTorch model counts them."""
    import torch

    if pair.family != "qwen2_vl":
        return torch.arange(len(ids))[None] + shift + pair.family.startswith("paligemma")
    pair.model.model.rope_deltas = None
    arguments = pair.model_inputs(ids, pair.shown, 0)
    arguments.pop("pixel_values", None)
    return pair.model.model.get_rope_index(**arguments)[0] + shift


def logits_with_prefix(pair, prefix) -> np.ndarray:
    """PyTorch's with the prefix as a KV cache."""
    import torch
    import transformers

    config, cache = pair.student.config, transformers.DynamicCache(config=pair.model.config)
    for layer in range(config.num_layers):
        heads = (1, 5, config.num_kv_heads, config.head_dim)
        key, value = (torch.tensor(np.array(prefix[name][layer])) for name in ("key", "value"))
        cache.update(key.reshape(heads).transpose(1, 2), value.reshape(heads).transpose(1, 2), layer)
    types = pair.model_inputs(pair.ids, pair.shown, len(pair.ids) - TARGET).get("token_type_ids")
    # They count from the cache's beginning; every token attends to the prefix in any case.
    types = {} if types is None else {"token_type_ids": torch.nn.functional.pad(types, (5, 0), value=1)}
    return theirs(
        pair, None, **types, past_key_values=cache, position_ids=torch_positions(pair, pair.ids, 5),
        attention_mask=torch.ones(1, 5 + len(pair.ids), dtype=torch.long),
    )  # fmt: skip


def test_prefix(pair, bare_logits, reference, tmp_path):
    """Keys and values before images and text, and positions after them, images' included."""
    student, settings = pair.student, settings_for("prefix")
    tree = random_adapter(settings, student.config, student.params, spread=1.0)
    expected = reference(
        f"adapters/vision/{pair.family}_prefix", lambda: {"logits": logits_with_prefix(pair, tree["prefix"])}, 1e-4
    )["logits"]
    assert np.abs(expected - bare_logits).max() > 1e-2
    np.testing.assert_allclose(logits_of(pair, settings)(tree, pair.ids), expected, atol=1e-3)
    folder = written(pair, settings, tree, tmp_path / "peft")
    jax.tree.map(np.testing.assert_array_equal, read_peft(folder, student.config).tree, tree)


@pytest.mark.live
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_peft_loads_soft_tokens(pair, method, tmp_path):
    """Its logits are ours where it passes on what positions and masks depend on, which it does for SmolVLM alone."""
    settings = settings_for(method)
    tree = random_adapter(settings, pair.student.config, pair.student.params)
    model = loaded(pair, written(pair, settings, tree, tmp_path / "peft"))
    if pair.family == "smolvlm":
        count, found = 4 * (method == "prompt"), pair.logits(pair.ids, pair.shown, len(pair.ids) - TARGET, model)
        ids = SoftPromptTokens(count).put(pair.ids)
        ours = logits_of(pair, settings)(tree, ids)
        np.testing.assert_allclose(sliced(found[-len(ids) :]), ours, atol=1e-3)


def logits_with_prompt(pair, ids, embeddings) -> np.ndarray:
    """PyTorch's with the prompt's embeddings in place of those of its ids, which are negative."""
    import torch

    stand_in = [STAND_IN if token < 0 else token for token in ids]
    arguments = pair.model_inputs(stand_in, pair.shown, len(ids) - TARGET)
    inputs = pair.model.get_input_embeddings()(arguments.pop("input_ids")).detach().clone()
    inputs[0, [place for place, token in enumerate(ids) if token < 0]] = torch.tensor(np.array(embeddings))
    arguments.pop("mm_token_type_ids", None)
    with torch.no_grad():
        positions = torch_positions(pair, stand_in, 0)
        return sliced(pair.model(**arguments, inputs_embeds=inputs, position_ids=positions).logits[0].numpy())


@pytest.mark.parametrize("after_image", [False, True])
def test_prompt_before_and_after_an_image(pair, after_image, reference):
    """Encoder, packing and model against embeddings that are placed by hand."""
    student, config, settings = pair.student, pair.student.config, settings_for("prompt")
    tree = random_adapter(settings, config, student.params)
    ids = SoftPromptTokens(4, after_image).put(pair.ids, pair.prompt.image_end)
    features = [position for position, token in enumerate(ids) if token >= config.vocab_size]
    soft = [position for position, token in enumerate(ids) if token < 0]
    assert soft[0] > features[-1] if after_image else soft == [0, 1, 2, 3]
    name = f"adapters/vision/{pair.family}_prompt_{'after' if after_image else 'before'}"
    compute = lambda: {"logits": logits_with_prompt(pair, ids, tree["prompt"]["embedding"])}  # noqa: E731
    expected = reference(name, compute, 1e-4)["logits"]
    np.testing.assert_allclose(logits_of(pair, settings)(tree, ids), expected, atol=1e-3)
    if after_image:
        settings.prompt.after_image = True
        with pytest.raises(UserError, match="config.adapter.prompt.after_image=False"):
            to_peft(settings, tree, config, "")


@pytest.mark.parametrize("text", ["ab", "look at the picture"])
def test_prompts_start_as_peft_starts_them(pair, text, reference):
    """From a text that is shorter, and one that is longer than the prompt."""

    def compute():
        import peft

        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(pair.path),
        )  # fmt: skip
        model = peft.get_peft_model(torch_model(pair.path), config)
        return {"embedding": model.prompt_encoder["default"].embedding.weight.detach().numpy()}

    student = pair.student
    expected = reference(f"adapters/vision/{pair.family}_start_{len(text)}", compute)["embedding"]
    settings = settings_for("prompt", **{"prompt.length": 5, "prompt.init": "text", "prompt.text": text})
    words = adapters.prompt_text_tokens(settings, student.tokenizer)
    tree = adapters.init_adapter(settings, student.config, student.params, 0, words)
    np.testing.assert_allclose(tree["prompt"]["embedding"], expected, rtol=1e-6)


# ---- without a reference


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


@pytest.mark.parametrize(("methods", "vision_encoder"), [(("visual",), False), (("lora",), True)])
def test_models_of_text_have_no_vision_encoder(tiny_student, methods, vision_encoder):
    settings = settings_for(*methods, **{"lora.vision_encoder": vision_encoder})
    with pytest.raises(UserError, match="text-only model"):
        adapters.init_adapter(settings, tiny_student.config, tiny_student.params, 0)


def test_layers_of_published_vision_encoders_have_distinct_names():
    """No two layers of a model have the same name in an adapter's tree."""
    for name in ("paligemma2-3b", "smolvlm-256m", "qwen2-vl-2b"):
        student = CATALOGUE[name].config
        found = vision_linear_layers(student)
        assert all(layer.startswith("vision.") for layer in found)
        assert sum(len(leaf.names) for leaf in found.values()) == {"paligemma2-3b": 27 * 6 + 1, "smolvlm-256m": 12 * 6 + 1, "qwen2-vl-2b": 32 * 4 + 2}[name]  # fmt: skip


# ---- deep prompts, and adapters of a vision encoder in training


@pytest.fixture(scope="module", params=["smolvlm-tiny", "qwen2-vl-tiny"])
def batch_of(request, tmp_path_factory):
    """(student, a packed row with an image) of each kind of vision encoder."""
    student = load_student(f"random:{request.param}")
    images = load_images(tmp_path_factory.mktemp("images"), student.config.vision, student.config.vocab_size, [problem("0", png(0, (50, 40)))])  # fmt: skip
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


def test_lora_s_dropout_reaches_the_vision_encoder(batch_of):
    """Of layers that the decoder does not have."""
    student, batch = batch_of
    settings = settings_for("lora", **{"lora.vision_encoder": True, "lora.targets": ("fc1",), "lora.dropout": 0.5})
    tree = random_adapter(settings, student.config, student.params)
    decoder = Decoder(student.config, lora_dropout=0.5)
    loss = jax.jit(lambda key, tree, base, batch: row_losses(settings, decoder, tree, base, batch, key))
    one, same, other = (loss(jax.random.key(seed), tree, student.params, batch) for seed in (0, 0, 1))
    assert one == same and one != other


def test_cached_features_are_refused_where_the_vision_encoder_is_adapted(batch_of):
    student, batch = batch_of
    tree = adapters.init_adapter(settings_for("visual"), student.config, student.params, 0)
    known = batch._replace(images=ImageInputs(features=jnp.zeros((1, 8, student.config.hidden_size))))
    with pytest.raises(ValueError, match="without the adapter"):
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


def test_all_methods_of_a_vision_encoder_train_and_answer(tmp_path, capsys):
    """Deep prompts, LoRA of vision encoder and decoder, and a prompt from text; training scores options, evaluation writes."""
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
    assert [entry[0]["text"] for entry in words] == list("look") and "nearest tokens" in capsys.readouterr().out
    assert evaluate(config, str(tmp_path / "run"), runtime)["n"]["AVG"] == 3


@pytest.mark.parametrize("name", ["paligemma2-3b", "smolvlm-256m", "qwen2-vl-2b"])
def test_every_adapter_of_a_published_vision_encoder_is_sharded(name):
    student, mesh = CATALOGUE[name].config, make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    settings = settings_for("lora", "prompt", "prefix", "visual", **{"lora.vision_encoder": True})
    tree = jax.eval_shape(lambda base: adapters.init_adapter(settings, student, base, 0), param_shapes(student))
    placed = shardings(tree, mesh)
    assert placed["visual"]["embedding"].is_fully_replicated
    assert not placed["lora"]["q_proj"]["a"].is_fully_replicated


# ---- the export verb


@pytest.fixture(scope="module", params=["idefics3", "paligemma"])
def published(request, tmp_path_factory):
    """(configuration, student, adapter) of a directory as a hub has them, and an adapter of PEFT of vision encoder and decoder."""
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
    tree = random_adapter(settings, student.config, student.params)
    (root / "adapter").mkdir()
    write_peft(to_peft(settings, tree, student.config, str(root / "base")), root / "adapter")
    config = tiny_config(
        root,
        **{"student.path": str(root / "base"), "adapter.peft": str(root / "adapter"), "eval.checkpoint": "none", "eval.max_new_tokens": 6},
    )  # fmt: skip
    return config, student, settings, tree, root


def exported(published, kind):
    """(front matter, text, code) of the card of an export."""
    config, _, _, _, root = published
    out = root / kind
    if not out.exists():
        export(config, str(root), kind, str(out))
    return card_of(out)


@pytest.mark.parametrize("kind", ["peft", "hf"])
def test_cards_of_exports_say_what_they_are(published, kind):
    front, text, _ = exported(published, kind)
    assert front["pipeline_tag"] == "image-text-to-text" and "vision encoder and connector included" in text


@pytest.mark.live
@pytest.mark.parametrize("kind", ["peft", "hf"])
def test_exports_answer_as_the_student(published, kind):
    """What a card's snippet prints, with transformers' processor and model, and PEFT's adapter or merged weights."""
    config, student, settings, tree, root = published
    shown = example(student)
    images = load_images(root, student.config.vision, student.config.vocab_size, [shown])
    (prompt,) = encoder_for(config, student.tokenizer, images).encode([shown], [arm_format(config.recipe)])
    mesh = make_mesh(default().mesh, jax.devices()[:1])
    generator = Generator(settings, Decoder(student.config), mesh, student.eos_ids, 6, 1, images=ImageBatcher(images))  # fmt: skip
    ((_, ids),) = generator(tree, student.params, [prompt.tokens])
    _, _, code = exported(published, kind)
    assert run_snippet(code)[0] == student.tokenizer.decode(ids, skip_special_tokens=True) + "\n"


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
