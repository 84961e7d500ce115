"""Qwen2-VL's tower, pixels and positions against transformers' PyTorch model and processor."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from sqa_jax.checkpoints.renamed_source import RenamedSource
from sqa_jax.checkpoints.safetensors_source import SafetensorsSource, read_hf_config
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.checkpoints.weights import _read_boxes
from sqa_jax.data.image import rgb
from sqa_jax.errors import UserError
from sqa_jax.models.layers.attention import mrope_positions
from sqa_jax.models.vision import qwen2_vl
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.encode import encode_images as see_unjitted
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision, param_specs, picture, places, row_arrays
from sqa_jax.models.vision.qwen2_vl.encoder import Qwen2VLVisionEncoder
from sqa_jax.models.vision.qwen2_vl.preprocess import coordinates

TEXT = dict(
    vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 2, 2]),
)  # fmt: skip
VISION = dict(
    depth=3, embed_dim=32, num_heads=2, mlp_ratio=3, hidden_size=24, patch_size=4, temporal_patch_size=2,
    spatial_merge_size=2,
)  # fmt: skip
IDS = dict(image_token_id=60, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59)
PIXELS = {"min_pixels": 64, "max_pixels": 4096, "patch_size": 4}
# As config.json and preprocessor_config.json of Qwen/Qwen2-VL-2B-Instruct have it.
PUBLISHED = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 1536,
    "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 151936, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
}  # fmt: skip
PUBLISHED_PROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
}  # fmt: skip


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, shape, np.uint8)).convert(mode)


def read_tower(directory, vision: Qwen2VLVision):
    source, tree = RenamedSource(SafetensorsSource(directory), qwen2_vl.NAMES), {}
    for leaf in param_specs(vision):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = _read_boxes(source, leaf, [tuple(map(range, leaf.shape))], np.float32)[0]
    return tree["vision"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random PyTorch model, our options and our parameters from the files that it saves."""
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **IDS)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if "norm" in name or "ln_q" in name or "bias" in name else 0.1))
    directory = tmp_path_factory.mktemp("qwen2_vl")
    model.save_pretrained(directory)
    vision = qwen2_vl.from_hf(read_hf_config(directory), PIXELS, "config")
    return model, vision, read_tower(directory, vision)


def patches_of(vision, one):
    """[N, numbers of a patch] as the tower reads them, by NumPy: normalised, and the same in both frames."""
    squares = one.pieces.astype(np.float32) / 255
    mean, std = (np.float32(x)[:, None, None] for x in (vision.pixels.mean, vision.pixels.std))
    frames = ((squares - mean) / std)[:, :, :, None].repeat(2, axis=3)
    return frames.reshape(-1, np.prod(vision.patch_shape))


def batch(vision, images, squares):
    """Pictures in one row of `squares` features."""
    sizes = [(len(one.pieces), one.rows, one.columns) for one in images]
    inputs = row_arrays(vision, [one.pieces for one in images], sizes, squares)
    return jax.tree.map(lambda array: array[None], inputs)


@pytest.fixture(scope="module")
def images(pair):
    return [picture(pair[1], noise(*size)) for size in [(31, 18), (8, 40)]]


see = jax.jit(see_unjitted, static_argnums=(0, 3))


@partial(jax.jit, static_argnums=(0, 1))
def run(vision, remat, params, batch, adaptation=NO_VISION_ADAPTER):
    colours = jnp.moveaxis(vision.pixels.normalised(jnp.moveaxis(batch.pixels, 3, -1)), -1, 3)
    frames = colours[:, :, :, :, None].repeat(2, axis=4).reshape(1, -1, np.prod(vision.patch_shape))
    tower = Qwen2VLVisionEncoder(vision, ComputeConfig(remat=remat))
    return tower.apply({"params": params}, frames, batch.coordinates, batch.image_ids, adaptation)


def reference(model, vision, images):
    grid = torch.tensor([[1, one.rows, one.columns] for one in images])
    with torch.no_grad():
        patches = torch.tensor(np.concatenate([patches_of(vision, one) for one in images]))
        return model.model.visual(patches, grid).pooler_output


def test_features_of_pictures_in_one_row_and_alone(pair, images):
    model, vision, params = pair
    assert {(one.rows, one.columns) for one in images} == {(4, 8), (10, 2)}
    expected = reference(model, vision, images).numpy()
    together = see(vision, params, batch(vision, images, 16), ComputeConfig())
    np.testing.assert_allclose(together[0, : len(expected)], expected, atol=1e-4)
    for one, own in zip(images, np.split(expected, [len(images[0].pieces)]), strict=True):
        alone = see(vision, params, batch(vision, [one], 16), ComputeConfig())
        np.testing.assert_allclose(alone[0, : len(own)], own, atol=1e-4)


def with_prompts(vision, tower, one, prompts):
    """Their tower's own blocks with inputs in front of each that are not turned, and dropped behind it."""
    x = tower.patch_embed(torch.tensor(patches_of(vision, one)))
    cos, sin = tower.rotary_pos_emb(x, torch.tensor(coordinates(vision, one.rows, one.columns)))
    count = prompts.shape[1]
    cos = torch.cat([torch.ones(count, cos.shape[1]), cos])
    sin = torch.cat([torch.zeros(count, sin.shape[1]), sin])
    for block, own in zip(tower.blocks, prompts, strict=True):
        x = torch.cat([own, x])
        x = block(x, cu_seqlens=torch.tensor([0, len(x)]), position_embeddings=(cos, sin))[count:]
    return tower.merger(x)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_deep_prompts_and_their_gradient(pair, images, remat):
    model, vision, params = pair
    prompts = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    expected = torch.cat([with_prompts(vision, model.model.visual, one, prompts) for one in images])
    (slope,) = torch.autograd.grad(expected.square().sum(), prompts)
    rows = batch(vision, images, 16)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def ours(prompts):
        made = see(vision, params, rows, ComputeConfig(remat=remat), VisionAdapter(prompts))[0, : len(expected)]
        return (made**2).sum(), made

    (_, made), own_slope = ours(jnp.asarray(prompts.detach().numpy()))
    np.testing.assert_allclose(made, expected.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(own_slope, slope.numpy(), atol=1e-3, rtol=1e-3)


def test_lora_in_the_tower_is_pefts(pair, images):
    model, vision, params = pair
    layers = list(vision.linear_shapes())
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=rf".*visual\.blocks.*\.({'|'.join(layers)})")
    torch.manual_seed(3)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    state = peft.get_peft_model_state_dict(adapted)
    assert len(state) == 2 * vision.depth * len(layers)

    def stack(layer, matrix):
        module = (
            f"base_model.model.model.visual.blocks.{{}}.{vision.linear_shapes()[layer][0]}.{layer}.lora_{matrix}.weight"
        )
        return jnp.stack([state[module.format(i)].numpy().T for i in range(vision.depth)])

    lora = {layer: {"a": stack(layer, "A"), "b": stack(layer, "B")} for layer in layers}
    expected = reference(adapted.base_model.model, vision, images).numpy()
    made = run(vision, "none", params, batch(vision, images, 16), VisionAdapter(lora=lora))
    np.testing.assert_allclose(made[0, : len(expected)], expected, atol=1e-4)
    assert np.abs(expected - reference(model, vision, images).numpy()).max() > 0.1


def test_published_shapes_names_and_size():
    """Of Qwen2-VL-2B: its tensors are what transformers builds, 2.21B of them as its card says."""
    vision = qwen2_vl.from_hf(PUBLISHED, PUBLISHED_PROCESSOR, "config")
    assert vision == Qwen2VLVision(width=1536, max_pixels=12845056)
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig.from_dict(copy.deepcopy(PUBLISHED))
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    tower = {name: leaf.file_shape for leaf in param_specs(vision) for name in leaf.names}
    ours = {qwen2_vl.NAMES.ours(name): shape for name, shape in theirs.items()}
    assert tower == {name: shape for name, shape in ours.items() if "visual" in name}
    assert {"model.embed_tokens.weight", "model.layers.27.mlp.up_proj.weight", "model.norm.weight"} <= set(ours)
    assert sum(map(np.prod, tower.values())) == 665_271_296
    assert sum(map(np.prod, theirs.values())) == 2_208_985_600
    assert all(qwen2_vl.NAMES.published(name) == qwen2_vl.NAMES.ours(name) == name for name in ours)
    assert set(tower) >= {
        "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.blocks.31.attn.proj.bias",
        "visual.blocks.7.norm1.bias", "visual.blocks.7.norm2.weight", "visual.blocks.7.mlp.fc1.weight",
        "visual.blocks.7.mlp.fc2.bias", "visual.merger.ln_q.weight", "visual.merger.mlp.0.weight", "visual.merger.mlp.2.bias",
    }  # fmt: skip


def test_options_survive_transformers(pair):
    model, vision, _ = pair
    theirs = transformers.Qwen2VLConfig(text_config=TEXT, **qwen2_vl.to_hf(vision)).to_dict()
    processor = transformers.Qwen2VLImageProcessorPil(**qwen2_vl.processor_to_hf(vision)).to_dict()
    assert theirs["vision_config"] == model.config.to_dict()["vision_config"]
    assert qwen2_vl.from_hf(theirs, processor, "config") == vision
    assert qwen2_vl.from_hf(theirs, {"image_processor": processor}, "config") == vision
    default = qwen2_vl.from_hf(PUBLISHED, {}, "config")
    size = transformers.Qwen2VLImageProcessorPil().size
    assert (default.min_pixels, default.max_pixels) == (size.shortest_edge, size.longest_edge)


@pytest.mark.parametrize(
    "own, processor, message",
    [
        ({"vision_config": {}, "model_type": "llava"}, {}, "llava"),
        ({"vision_config.model_type": "siglip_vision_model"}, {}, "siglip_vision_model"),
        ({"model_type": "qwen2_5_vl"}, {}, "qwen2_5_vl"),
        ({"vision_config.hidden_act": "silu"}, {}, "silu"),
        ({"vision_config.depth": "many"}, {}, "depth is 'many'"),
        ({"vision_config.num_heads": 12}, {}, "12 heads"),
        ({"vision_config.hidden_size": 1000}, {}, "width 1000"),
        ({"vision_config.in_channels": 4}, {}, "4 channels"),
        ({"vision_config.embed_dim": None}, {}, "embed_dim"),
        ({"vision_config": {}}, {}, "'hidden_size' is missing"),
        ({}, {"do_resize": False}, "do_resize"),
        ({}, {"merge_size": 4}, "merge_size"),
        ({}, {"size": {"height": 20, "width": 20}}, "'shortest_edge'"),
        ({}, {"min_pixels": 99, "max_pixels": 10}, "min_pixels"),
        ({}, {"size": 3}, "not of its kind"),
        ({}, {"image_std": [0.5, 0.5, 0]}, "positive numbers"),
    ],
)
def test_unsupported_files_are_refused_by_name(own, processor, message):
    raw = copy.deepcopy(PUBLISHED)
    for key, value in own.items():
        *above, last = key.split(".")
        (raw[above[0]] if above else raw)[last] = value
    with pytest.raises(UserError, match=f"^here: .*{message}.*; .+"):
        qwen2_vl.from_hf(raw, processor, "here")


def reassembled(vision, one):
    """The colours, [rows · patch, columns · patch, 3], that a picture's patches hold."""
    side = vision.patch_size
    whole = np.empty((one.rows * side, one.columns * side, 3), np.uint8)
    patches = one.pieces.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    for (row, column), patch in zip(coordinates(vision, one.rows, one.columns) * side, patches, strict=True):
        whole[row : row + side, column : column + side] = patch
    return whole


def processor_of(vision):
    return transformers.Qwen2VLImageProcessorPil(**qwen2_vl.processor_to_hf(vision))


def same_picture(vision, image):
    """Ours is theirs, and `pixels.normalised`, which runs on the device, does what NumPy does."""
    theirs = processor_of(vision)(image, return_tensors="np")
    one = picture(vision, rgb(image))
    assert theirs["image_grid_thw"].tolist() == [[1, one.rows, one.columns]] and one.pieces.dtype == np.uint8
    np.testing.assert_allclose(patches_of(vision, one), theirs["pixel_values"], atol=1e-5)
    return one


@pytest.mark.parametrize("size", [(31, 18), (300, 20), (1, 1), (1, 200), (64, 64), (2000, 1500)])
def test_pixels(pair, size):
    """Patches are the processor's, and put in their places they make the resized picture."""
    vision, image = pair[1], noise(*size)
    one = same_picture(vision, image)
    resized = image.resize((one.columns * 4, one.rows * 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(reassembled(vision, one), np.asarray(resized))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_pictures_of_any_size(width, height):
    vision = Qwen2VLVision(width=1, patch_size=4, min_pixels=64, max_pixels=4096)
    image = Image.new("RGB", (width, height), "red")
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(UserError, match="200 times"):
            picture(vision, image)
        return
    try:
        one = same_picture(vision, image)
    except UserError as error:  # transformers goes beyond its own bound
        assert "too elongated for 4096 pixels" in str(error) and max(width, height) > 64 * min(width, height)
        return
    assert 64 <= one.rows * one.columns * 16 <= 4096


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "YCbCr", "LA", "F"])
def test_every_kind_of_picture(mode):
    same_picture(Qwen2VLVision(width=1), Image.new("LA", (30, 20), (9, 99)) if mode == "LA" else noise(30, 20, mode))


@pytest.mark.parametrize("size", [(3, 700), (700, 3), (0, 5), (0, 0)])
def test_pictures_that_have_no_shape_are_refused(size):
    with pytest.raises(UserError, match=f"{size[0]} × {size[1]} pixels: .*; crop it"):
        picture(Qwen2VLVision(width=1), Image.new("RGB", size))


def test_prompt_is_the_processors(pair):
    _, vision, _ = pair
    tokenizer = byte_tokenizer()
    words = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    start, end, pad, _ = tokenizer.convert_tokens_to_ids(words)
    vision = dataclasses.replace(vision, vision_start=start, vision_end=end, image_token=pad)

    class ForImages(Qwen2VLProcessor):  # without the part for videos, which asks for torchvision
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    processor = ForImages(processor_of(vision), tokenizer)
    images = [noise(31, 18), noise(8, 40)]
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    theirs = processor(images=images, text=[f"In {mark} and {mark}?"], return_tensors="np")
    ones = [picture(vision, image) for image in images]
    pieces = ["In ", ones[0], " and ", ones[1], "?"]
    ids = [
        tokenizer(piece)["input_ids"]
        if isinstance(piece, str)
        else qwen2_vl.prompt_ids(vision, piece.rows, piece.columns, tokenizer)
        for piece in pieces
    ]
    assert sum(ids, []) == theirs["input_ids"][0].tolist()
    with pytest.raises(UserError, match="image_pad"):
        qwen2_vl.prompt_ids(vision, 2, 2, byte_tokenizer())


SEQUENCES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 5), st.tuples(st.integers(1, 6), st.integers(1, 6))), max_size=3),
        st.integers(1, 5),
        st.lists(st.integers(1, 3), max_size=2),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


jitted_positions = jax.jit(mrope_positions, static_argnums=3)


@settings(max_examples=60, deadline=None)
@given(sequences=SEQUENCES)
def test_positions_of_text_and_pictures(pair, sequences):
    """Sequences of a packed row: in each pictures with text before and behind them, and then branches."""
    model, vision, _ = pair
    V, columns = 60, []  # (token, position, segment) of the row
    found: list[np.ndarray] = []
    features, expected = 0, []
    for segment, (images, behind, branches) in enumerate(sequences, 1):
        trunk = []
        for words, (down, across) in images:
            trunk += [1] * words + [V + features + k for k in range(down * across)]
            found.append(places(vision, down * vision.merge, across * vision.merge))
            features += down * across
        trunk += [1] * behind
        start = len(columns)
        columns += [(token, k, segment) for k, token in enumerate(trunk)]
        for size in branches or [0]:
            own = range(len(columns), len(columns) + size)
            columns += [(1, len(trunk) + k, segment) for k in range(size)]
            ids = torch.tensor([[min(token, V) for token in trunk] + [1] * size])
            grid = torch.tensor([[1, down * vision.merge, across * vision.merge] for _, (down, across) in images])
            theirs, _ = model.model.get_rope_index(ids, (ids == V).int(), image_grid_thw=grid if images else None)
            expected.append(([*range(start, start + len(trunk)), *own], theirs[:, 0].numpy().T))
    row = np.zeros((512, 3), np.int32)
    row[: len(columns)] = columns
    table = np.zeros((512, 4), np.int32)
    table[:features] = np.concatenate([*found, table[:0]])
    ours = np.asarray(jitted_positions(*row.T[:, None], V, table[None]))
    for own, theirs in expected:
        np.testing.assert_array_equal(ours[0, own], theirs)
