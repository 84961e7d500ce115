"""SigLIP encoders of PaliGemma and SmolVLM: pixels, prompts and features equal transformers'."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from sqa_jax.checkpoints.renamed_source import RenamedSource
from sqa_jax.checkpoints.safetensors_source import SafetensorsSource, read_hf_config
from sqa_jax.checkpoints.weights import read_blocks
from sqa_jax.data.image import rgb
from sqa_jax.errors import UserError
from sqa_jax.models.vision import paligemma, siglip_encoder, smolvlm
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from tests.support.torch_models import torch_model, write_checkpoint
from tests.support.vision_pair import as_bytes, as_text, random_array

# Patches of 7 in tiles of 30: two pixels on the right and at the bottom are in no patch.
SIGLIP = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=7
)
TEXT = dict(
    vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MODULES = {"paligemma": paligemma, "smolvlm": smolvlm, "idefics3": smolvlm}
ENCODERS = {
    "paligemma": siglip_encoder.PaliGemmaVisionEncoder,
    "smolvlm": siglip_encoder.SmolVLMVisionEncoder,
    "idefics3": siglip_encoder.SmolVLMVisionEncoder,
}
IMAGE = 260


@functools.cache
def config_of(family: str) -> transformers.PretrainedConfig:
    """transformers' configuration of a tiny model."""
    if family == "paligemma":
        return transformers.PaliGemmaConfig(
            vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
            text_config={**TEXT, "head_dim": 12, "model_type": "gemma2"}, projection_dim=24, image_token_index=IMAGE,
        )  # fmt: skip
    config_class = {"smolvlm": transformers.SmolVLMConfig, "idefics3": transformers.Idefics3Config}[family]
    text = {**TEXT, "model_type": "llama"}
    return config_class(vision_config=SIGLIP, text_config=text, scale_factor=2, image_token_id=IMAGE)


def tree_of(source, specs) -> dict:
    """The parameter tree of a source's tensors."""
    tree: dict = {}
    for spec in specs:
        node = tree
        for key in spec.path[:-1]:
            node = node.setdefault(key, {})
        node[spec.path[-1]] = jnp.asarray(read_blocks(source, spec, [tuple(map(range, spec.shape))], np.float32)[0])
    return tree


class Pair(NamedTuple):
    """Ours of a checkpoint, which transformers reads, too; and an image's tiles in pixels of 0 to 255."""

    family: str
    path: Path
    module: Any
    vision: Any
    params: dict
    tiles: np.ndarray
    features: Any  # (params, tiles, adapter) → features

    def theirs(self, model) -> np.ndarray:
        """Features of the tiles by a PyTorch model, [n · features_per_piece, width]."""
        import torch

        values = torch.tensor(normalized(self.vision, self.tiles).transpose(0, 3, 1, 2))
        with torch.no_grad():
            if self.module is paligemma:
                return model.get_image_features(values).pooler_output.flatten(0, 1).numpy()
            mask = torch.ones(1, *values.shape[:1], *values.shape[2:], dtype=torch.long)
            return model.get_image_features(values[None], mask).pooler_output[0].numpy()

    def ours(self, adapter: VisionAdapter = NO_VISION_ADAPTER) -> np.ndarray:
        found = self.features(self.params, self.tiles, adapter)
        assert found.shape == (len(self.tiles), self.vision.features_per_piece, self.vision.width)
        return found.reshape(-1, self.vision.width)


@pytest.fixture(scope="module", params=["paligemma", "smolvlm"])
def pair(request, tmp_path_factory) -> Pair:
    family, module = request.param, MODULES[request.param]
    path = write_checkpoint(tmp_path_factory.mktemp(family), config_of(family))
    vision = module.from_hf(read_hf_config(path), {}, str(path))
    source = RenamedSource(SafetensorsSource(path), module.TENSOR_NAMES)
    encoder = ENCODERS[family](vision)
    features = jax.jit(lambda params, tiles, adapter: encoder.apply({"params": params}, tiles, adapter))
    tiles = module.preprocess_image(vision, image_of(50, 15)).pieces
    params = tree_of(source, module.param_specs(vision))["vision"]
    return Pair(family, path, module, vision, params, tiles, features)


def normalized(vision, pieces: np.ndarray) -> np.ndarray:
    return np.asarray(vision.pixels.normalize(pieces))


def image_of(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(colours, "RGBA").convert(mode)


def processor_of(module, vision):
    """transformers' image processor, from the settings that we write."""
    raw = module.processor_to_hf(vision)
    extra = {} if module is paligemma else {"return_row_col_info": True}
    return getattr(transformers, raw["image_processor_type"] + "Pil")(**raw, **extra)


def theirs(module, vision, image: Image.Image):
    """Tiles [n, S, S, 3], rows and columns, as the image processor makes them."""
    out = processor_of(module, vision)(image, return_tensors="np")
    tiles = out["pixel_values"]
    if module is paligemma:
        return tiles.transpose(0, 2, 3, 1), 0, 0
    assert out["pixel_attention_mask"].all(), "no tile is padded"
    return tiles[0].transpose(0, 2, 3, 1), out["rows"][0][0], out["cols"][0][0]


def tiny(family: str):
    """(our module, its vision) without a model."""
    module = MODULES[family]
    return module, module.from_hf(config_of(family).to_dict(), {}, family)


def check_same_pixels(module, vision, image: Image.Image) -> None:
    ours, (tiles, rows, cols) = module.preprocess_image(vision, rgb(image)), theirs(module, vision, image)
    assert (ours.rows, ours.columns) == (rows, cols) and ours.pieces.dtype == np.uint8
    assert len(ours.pieces) == (rows * cols + 1 if rows else 1)
    np.testing.assert_allclose(normalized(vision, ours.pieces), tiles, atol=1e-5)


@pytest.mark.parametrize("family", ["paligemma", "smolvlm", "idefics3"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "PA"])
def test_pixels_of_every_image_mode(family, mode):
    image = image_of(41, 23, "P").convert("PA") if mode == "PA" else image_of(41, 23, mode)
    check_same_pixels(*tiny(family), image)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from(["paligemma", "smolvlm"]), st.booleans())
def test_pixels_of_every_size(width, height, family, splits):
    module, vision = tiny(family)
    vision = dataclasses.replace(vision, splits=splits) if family == "smolvlm" else vision
    check_same_pixels(module, vision, image_of(width, height))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (31, 30), (30, 30)])
def test_pixels_of_extreme_sizes(size):
    for family in ("paligemma", "smolvlm"):
        check_same_pixels(*tiny(family), image_of(*size))


def test_files_that_hold_more_than_one_plain_frame(tmp_path):
    """An animation shows its first frame, and a transparent colour is white, as in transformers."""
    module, vision = tiny("paligemma")
    red, blue = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "two.gif", save_all=True, append_images=[blue])
    see_through = Image.new("P", (9, 9), 0)
    see_through.putpalette([0, 0, 0, 255, 0, 0])
    see_through.save(tmp_path / "clear.png", transparency=0)
    for name in ("two.gif", "clear.png"):
        with Image.open(tmp_path / name) as image:
            check_same_pixels(module, vision, image)


def test_features_of_several_tiles(pair, reference):
    assert len(pair.tiles) == (1 if pair.module is paligemma else 4 * 2 + 1)
    expected = bare_features(pair, reference)
    np.testing.assert_allclose(pair.ours(), expected, atol=1e-4)


def bare_features(pair, reference) -> np.ndarray:
    name = f"models/vision/siglip/{pair.family}_features"
    return reference(name, lambda: {"features": pair.theirs(torch_model(pair.path))})["features"]


def test_features_in_half_precision():
    module, vision = tiny("smolvlm")
    tiles = module.preprocess_image(vision, image_of(30, 30)).pieces
    wide, half = (
        siglip_encoder.SmolVLMVisionEncoder(vision, ComputeConfig(dtype)) for dtype in (jnp.float32, jnp.bfloat16)
    )
    params = jax.jit(wide.init)(jax.random.key(0), tiles)
    found, exact = jax.jit(half.apply)(params, tiles), jax.jit(wide.apply)(params, tiles)
    assert found.dtype == jnp.bfloat16
    assert np.abs(found - exact).max() < 0.03 * np.abs(exact).max()


def test_module_initialises_the_tree_that_files_are_read_into(pair):
    encoder = ENCODERS[pair.family](pair.vision)
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.asarray(pair.tiles)))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(jnp.shape, pair.params)


def prompts_of(vision, length: int = 3) -> np.ndarray:
    return random_array("prompts", (vision.encoder.num_layers, length, vision.encoder.hidden_size), 1)


def test_deep_prompts_are_prepended_in_every_layer(pair, reference):
    """As in VPT's code: each layer takes [prompts; patches], and its outputs for the prompts are dropped."""
    prompts = prompts_of(pair.vision)

    def compute():
        import torch

        whole = torch_model(pair.path)
        encoder = (whole.model.vision_tower if pair.module is paligemma else whole.model.vision_model).encoder

        def prepend(layer, arguments, prompt):
            x, *rest = arguments
            return torch.cat([prompt.expand(len(x), -1, -1), x], 1), *rest

        for layer, prompt in zip(encoder.layers, torch.tensor(prompts), strict=True):
            layer.register_forward_pre_hook(functools.partial(prepend, prompt=prompt))
            layer.register_forward_hook(lambda layer, _, out: out[:, 3:])
        return {"features": pair.theirs(whole)}

    expected = reference(f"models/vision/siglip/{pair.family}_prompts", compute)["features"]
    np.testing.assert_allclose(pair.ours(VisionAdapter(jnp.asarray(prompts))), expected, atol=1e-4)
    assert np.abs(expected - bare_features(pair, reference)).max() > 1e-2


def test_lora_equals_peft(pair, reference):
    lora = {}
    for name in ("q_proj", "out_proj", "fc2"):
        _, width_in, width_out = pair.vision.encoder.linear_shapes()[name]
        lora[name] = {
            "a": random_array(f"{name}.a", (2, width_in, 2), 0.2), "b": random_array(f"{name}.b", (2, 2, width_out), 0.2),
        }  # fmt: skip

    def compute():
        import peft
        import torch

        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=rf".*vision.*\.({'|'.join(lora)})")
        adapted = peft.inject_adapter_in_model(config, torch_model(pair.path)).eval()
        with torch.no_grad():
            for name, linear in adapted.named_modules():
                if hasattr(linear, "lora_A"):
                    layer, matrices = int(name.split("layers.")[1].split(".")[0]), lora[name.split(".")[-1]]
                    linear.lora_A["default"].weight.copy_(torch.tensor(matrices["a"][layer].T.copy()))
                    linear.lora_B["default"].weight.copy_(torch.tensor(matrices["b"][layer].T.copy()))
        return {"features": pair.theirs(adapted)}

    expected = reference(f"models/vision/siglip/{pair.family}_lora", compute)["features"]
    np.testing.assert_allclose(pair.ours(VisionAdapter(lora=lora)), expected, atol=1e-4)
    assert np.abs(expected - bare_features(pair, reference)).max() > 1e-2


def test_rematerialisation_changes_no_gradient():
    module, vision = tiny("smolvlm")
    tiles = jnp.asarray(module.preprocess_image(vision, image_of(30, 30)).pieces)
    params = jax.jit(siglip_encoder.SmolVLMVisionEncoder(vision).init)(jax.random.key(0), tiles)

    def gradient(remat):
        encoder = siglip_encoder.SmolVLMVisionEncoder(vision, ComputeConfig(remat=remat))
        return jax.jit(jax.grad(lambda prompts: encoder.apply(params, tiles, VisionAdapter(prompts)).var()))(
            jnp.asarray(prompts_of(vision))
        )

    kept, recomputed = gradient("none"), gradient("full")
    np.testing.assert_allclose(kept, recomputed, rtol=1e-4, atol=1e-9)
    assert (np.abs(kept).max(axis=(1, 2)) > 0).all(), "prompts of every layer count"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and the special tokens of both families; "\\n\\n" is one token, as it is in SmolLM's vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"ĊĊ": 256}
    model = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<image>", "<global-img>"]})
    assert made.convert_tokens_to_ids("<image>") == IMAGE
    return made


@pytest.mark.parametrize("size", [(30, 30), (200, 20), (60, 70)])
def test_prompts_of_images(tokenizer, size):
    """In the middle of a text, as the processors expand it."""
    image = image_of(*size)
    for family in ("smolvlm", "idefics3"):
        module, vision = tiny(family)
        shown = module.preprocess_image(vision, image)
        ids = module.prompt_ids(vision, shown.rows, shown.columns, tokenizer)
        assert ids.count(IMAGE) == len(shown.pieces) * vision.features_per_piece
        processor = transformers.Idefics3Processor(
            processor_of(module, vision), tokenizer, image_seq_len=vision.features_per_piece
        )
        (expected,) = processor(images=[image], text=["User: <image>What is it?\n"])["input_ids"]
        before, after = (tokenizer(text)["input_ids"] for text in ("User: ", "What is it?\n"))
        assert before + ids + after == expected
        written = get_image_prompt_string(
            shown.rows, shown.columns, vision.features_per_piece, "<fake_token_around_image>", "<image>", "<global-img>"
        )
        assert ids == tokenizer(written)["input_ids"]
    module, vision = tiny("paligemma")
    ids = module.prompt_ids(vision, 0, 0, tokenizer)
    tokenizer.image_token, tokenizer.image_token_id = "<image>", IMAGE
    processor = transformers.PaliGemmaProcessor(processor_of(module, vision), tokenizer)
    (expected,) = processor(images=[image], text=["<image>What is it?"])["input_ids"]
    assert ids + tokenizer("<bos>What is it?\n")["input_ids"] == expected


def test_another_models_tokenizer_is_refused(tokenizer):
    for family in ("paligemma", "smolvlm"):
        module, vision = tiny(family)
        with pytest.raises(UserError, match="the tokenizer has <image> as 260, the model as 259"):
            module.prompt_ids(dataclasses.replace(vision, image_token=259), 0, 0, tokenizer)


# Of each published model the vision part of its config.json, and the parameters of all of it that its card counts.
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
BASE = dict(hidden_size=768, num_attention_heads=12, image_size=512, patch_size=16)
SMOLLM2 = dict(
    model_type="llama", vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3,
)  # fmt: skip
SMOLLM2_360M = {**SMOLLM2, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                "num_attention_heads": 15, "num_key_value_heads": 5}  # fmt: skip
SMOLLM2_1B = {**SMOLLM2, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
              "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
GEMMA = dict(
    model_type="gemma", vocab_size=257216, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
    num_attention_heads=8, num_key_value_heads=1,
)  # fmt: skip
GEMMA2 = dict(
    model_type="gemma2", vocab_size=257216, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
    num_attention_heads=8, num_key_value_heads=4,
)  # fmt: skip
_PALIGEMMA = dict(
    model_type="paligemma", image_token_index=257152,
    vision_config={**SO400M, "model_type": "siglip_vision_model", "vision_use_head": False},
)  # fmt: skip
_SMOLVLM = dict(model_type="idefics3", image_token_id=49190, scale_factor=4, tie_word_embeddings=False)
_TILES_384 = {**SO400M, "image_size": 384, "model_type": "smolvlm_vision"}
PUBLISHED = {
    "paligemma-3b-pt-224": (
        {**_PALIGEMMA, "projection_dim": 2048, "text_config": GEMMA}, 256, 2_923_466_480,
    ),
    "paligemma2-3b-pt-224": (
        {**_PALIGEMMA, "projection_dim": 2304, "text_config": GEMMA2}, 256, 3_032_242_416,
    ),
    "SmolVLM-256M-Instruct": (
        {**_SMOLVLM, "vision_config": {**BASE, "model_type": "idefics3_vision"}, "text_config": SMOLLM2}, 64, 256_484_928,
    ),
    "SmolVLM2-500M-Video-Instruct": (
        {**_SMOLVLM, "model_type": "smolvlm", "vision_config": {**BASE, "model_type": "smolvlm_vision"},
         "text_config": SMOLLM2_360M}, 64, 507_482_304,
    ),
    "SmolVLM2-2.2B-Instruct": (
        {**_SMOLVLM, "model_type": "smolvlm", "scale_factor": 3, "vision_config": _TILES_384,
         "text_config": SMOLLM2_1B}, 81, 2_246_784_880,
    ),
}  # fmt: skip


def tensors_of(config: transformers.PretrainedConfig) -> dict[str, np.ndarray]:
    """Names and shapes of a model's parameters as transformers builds it, without their values."""
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    lines = (f"{name} {','.join(map(str, p.shape))}" for name, p in model.named_parameters())
    return {"tensors": as_bytes("\n".join(lines))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name, reference):
    """Their tensors have the names and shapes of transformers' model, which has as many parameters as the card says."""
    raw, tokens, count = PUBLISHED[name]
    module = MODULES[raw["model_type"]]
    vision = module.from_hf(raw, {}, name)
    assert vision.features_per_piece == tokens
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw | module.to_hf(vision))
    text = as_text(reference(f"models/vision/published/{name}", lambda: tensors_of(config))["tensors"])
    tensors = {key: tuple(map(int, shape.split(","))) for key, shape in map(str.split, text.split("\n"))}
    shapes = {module.TENSOR_NAMES.ours(key): shape for key, shape in tensors.items()}
    assert sum(map(math.prod, tensors.values())) == count
    expected = {name: spec.file_shape for spec in module.param_specs(vision) for name in spec.names}
    assert expected.items() <= shapes.items()
    language = {key for key in shapes if key.startswith(("model.embed", "model.layers", "model.norm", "lm_head"))}
    assert shapes.keys() == expected.keys() | language
    assert math.prod(shapes["model.embed_tokens.weight"]) == raw["text_config"]["vocab_size"] * vision.width


@pytest.mark.parametrize(
    ("module", "ours", "spellings"),
    [
        (
            paligemma,
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
            [
                "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
                "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
                "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
                "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
            ],
        ),
        (
            paligemma,
            "multi_modal_projector.linear.weight",
            ["multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.weight"],
        ),
        (
            paligemma,
            "model.layers.3.mlp.up_proj.weight",
            ["language_model.model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"],
        ),
        (paligemma, "lm_head.weight", ["language_model.lm_head.weight", "lm_head.weight"]),
        (smolvlm, "model.vision_model.post_layernorm.bias", ["model.vision_model.post_layernorm.bias"]),
        (smolvlm, "model.connector.modality_projection.proj.weight", ["model.connector.modality_projection.proj.weight"]),
        (smolvlm, "model.norm.weight", ["model.text_model.norm.weight"]),
        (smolvlm, "lm_head.weight", ["lm_head.weight"]),
    ],
)  # fmt: skip
def test_every_spelling_of_a_tensor(module, ours, spellings):
    """The published one first: that is the one that is written."""
    assert {module.TENSOR_NAMES.ours(name) for name in spellings} == {ours}
    assert module.TENSOR_NAMES.published(ours) == spellings[0]


def test_a_tensor_that_is_there_twice_is_refused():
    class Source:
        where, shapes = "here", {"lm_head.weight": (2, 2), "language_model.lm_head.weight": (2, 2)}

        def locate(self, name):
            return f"{self.where}: tensor {name}"

    with pytest.raises(UserError, match="here: tensor language_model.lm_head.weight is there again as lm_head.weight"):
        RenamedSource(Source(), paligemma.TENSOR_NAMES)
    Source.shapes = {"language_model.lm_head.weight": (2, 2)}
    renamed = RenamedSource(Source(), paligemma.TENSOR_NAMES)
    assert renamed.shapes == {"lm_head.weight": (2, 2)}
    assert renamed.locate("lm_head.weight") == "here: tensor language_model.lm_head.weight"
    assert renamed.locate("model.norm.weight") == "here: tensor language_model.model.norm.weight"


@pytest.mark.parametrize("family", list(MODULES))
def test_configurations_survive_writing_and_reading(family):
    module, vision = tiny(family)
    transform = dataclasses.replace(vision.pixels, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), resample=2, rescale=0.003)
    vision = dataclasses.replace(vision, pixels=transform)
    if family != "paligemma":
        vision = dataclasses.replace(vision, splits=False, longest_edge=77)
    text = {"text_config": {"hidden_size": 24}}
    processor = module.processor_to_hf(vision)
    assert module.from_hf(module.to_hf(vision) | text, processor, "again") == vision
    assert module.from_hf(module.to_hf(vision) | text, {"image_processor": processor}, "nested") == vision
    theirs = processor_of(module, vision).to_dict()
    assert module.from_hf(module.to_hf(vision) | text, theirs, "as transformers writes it") == vision


@pytest.mark.parametrize(
    ("family", "change", "processor", "words"),
    [
        ("paligemma", {"vision_config": {"model_type": "clip_vision_model"}}, {}, "'clip_vision_model' is not supported"),
        ("paligemma", {"vision_config": {"hidden_act": "relu"}}, {}, "activation is 'relu'"),
        ("paligemma", {"vision_config": {"num_attention_heads": 5}}, {}, "width of 32 cannot be split evenly into its 5 heads"),
        ("paligemma", {"vision_config": {"patch_size": 31}}, {}, "patch of 31 pixels does not fit a tile of 30"),
        ("paligemma", {"vision_config": {"image_size": [30, 30]}}, {}, r"image_size is \[30, 30\]"),
        ("paligemma", {"projection_dim": 25}, {}, "features of width 25 .* do not fit a language model of 24"),
        ("paligemma", {"image_token_index": None}, {}, "image_token_index is None"),
        ("paligemma", {}, {"size": {"height": 28, "width": 28}}, "the vision encoder takes 30 pixels a side"),
        ("paligemma", {}, {"do_rescale": False}, "do_rescale is false"),
        ("smolvlm", {}, {"image_std": [0.5, 0, 0.5]}, "not positive numbers of three channels"),
        ("smolvlm", {}, {"resample": 9}, "9 is not a valid Resampling"),
        ("smolvlm", {}, {"max_image_size": {"longest_edge": 28}}, "supported: tiles of 30"),
        ("smolvlm", {}, {"size": {"longest_edge": 5000}}, "from at most 4096"),
        ("smolvlm", {}, {"size": {"height": 9, "width": 9}}, "size is None"),
        ("smolvlm", {"scale_factor": 3}, {}, "4 × 4 patches cannot be divided into squares of 3"),
        ("smolvlm", {"text_config": {}}, {}, "text_config.hidden_size is None"),
        ("smolvlm", {"model_type": "llava"}, {}, "architecture 'llava' is not supported; supported: smolvlm, idefics3"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(family, change, processor, words):
    module, vision = tiny(family)
    raw = module.to_hf(vision) | {"text_config": {"hidden_size": 24}}
    nested = change.get("vision_config")
    raw |= {"vision_config": raw["vision_config"] | nested} if nested else change
    with pytest.raises(UserError, match=words):
        module.from_hf(raw, processor, "config.json")


def test_a_key_that_a_file_lacks_is_named():
    module, vision = tiny("smolvlm")
    raw = module.to_hf(vision) | {"text_config": {"hidden_size": 24}}
    del raw["vision_config"]["patch_size"]
    with pytest.raises(UserError, match="key 'patch_size' of the vision encoder is missing"):
        module.from_hf(raw, {}, "config.json")


@pytest.mark.parametrize("side", [26, 27, 32])
def test_positions_of_published_tiles_are_the_grid(side, reference):
    """SmolVLM computes a patch's position from its share of the tile; at the sides of its and Idefics 3's tiles that is
    its index."""

    def compute():
        import torch
        from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

        vision = dict(hidden_size=1, image_size=2 * side, patch_size=2)
        embeddings = SmolVLMVisionEmbeddings(transformers.SmolVLMConfig(vision_config=vision).vision_config)
        with torch.no_grad():
            for parameter in embeddings.patch_embedding.parameters():
                parameter.zero_()
            embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
            found = embeddings(torch.ones(1, 3, 2 * side, 2 * side), torch.ones(1, side, side, dtype=torch.bool))
        return {"positions": found.ravel().numpy().astype(np.int32)}

    found = reference(f"models/vision/siglip/positions_{side}", compute)["positions"]
    assert found.tolist() == list(range(side**2))
