"""Qwen2-VL's vision encoder, pixels and positions against transformers' PyTorch model and processor."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from sqa_jax.checkpoints.renamed_source import RenamedSource
from sqa_jax.checkpoints.safetensors_source import SafetensorsSource, read_hf_config
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.checkpoints.weights import read_blocks
from sqa_jax.data.image import rgb
from sqa_jax.errors import UserError
from sqa_jax.models.layers.rope import mrope_positions
from sqa_jax.models.vision import qwen2_vl
from sqa_jax.models.vision.adapter import ComputeConfig, VisionAdapter
from sqa_jax.models.vision.encode import encode_images
from sqa_jax.models.vision.qwen2_vl import (
    Qwen2VLVision,
    encoder_inputs,
    mrope_offsets,
    param_specs,
    preprocess_image,
)
from sqa_jax.models.vision.qwen2_vl.preprocess import coordinates
from tests.support.torch_models import torch_model, write_checkpoint
from tests.support.vision_pair import as_bytes, as_text, random_array

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


def read_encoder(directory, vision: Qwen2VLVision):
    source, tree = RenamedSource(SafetensorsSource(directory), qwen2_vl.TENSOR_NAMES), {}
    for spec in param_specs(vision):
        node = tree
        for key in spec.path[:-1]:
            node = node.setdefault(key, {})
        node[spec.path[-1]] = read_blocks(source, spec, [tuple(map(range, spec.shape))], np.float32)[0]
    return tree["vision"]


CONFIG = transformers.Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **IDS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a checkpoint that transformers reads, too; our configuration and parameters of it."""
    directory = write_checkpoint(tmp_path_factory.mktemp("qwen2_vl"), CONFIG)
    vision = qwen2_vl.from_hf(read_hf_config(directory), PIXELS, "config")
    return directory, vision, read_encoder(directory, vision)


def patches_of(vision, image):
    """[N, values of a patch] as the encoder takes them, by NumPy: normalized, and the same in both frames."""
    squares = image.pieces.astype(np.float32) / 255
    mean, std = (np.float32(x)[:, None, None] for x in (vision.pixels.mean, vision.pixels.std))
    frames = ((squares - mean) / std)[:, :, :, None].repeat(2, axis=3)
    return frames.reshape(-1, np.prod(vision.patch_shape))


def batch(vision, images, capacity):
    """Images in one row of `capacity` features."""
    grids = [(len(image.pieces), image.rows, image.columns) for image in images]
    inputs = encoder_inputs(vision, [image.pieces for image in images], grids, capacity)
    return jax.tree.map(lambda array: array[None], inputs)


@pytest.fixture(scope="module")
def images(pair):
    return [preprocess_image(pair[1], noise(*size)) for size in [(31, 18), (8, 40)]]


encode = jax.jit(encode_images, static_argnums=(0, 3))


def torch_features(model, vision, images):
    import torch

    grid = torch.tensor([[1, image.rows, image.columns] for image in images])
    with torch.no_grad():
        patches = torch.tensor(np.concatenate([patches_of(vision, image) for image in images]))
        return model.model.visual(patches, grid).pooler_output.numpy()


@pytest.fixture(scope="module")
def bare_features(pair, images, reference):
    directory, vision, _ = pair
    compute = lambda: {"features": torch_features(torch_model(directory), vision, images)}  # noqa: E731
    return reference("models/vision/qwen2_vl/features", compute)["features"]


def test_features_of_images_in_one_row_and_alone(pair, images, bare_features):
    _, vision, params = pair
    assert {(image.rows, image.columns) for image in images} == {(4, 8), (10, 2)}
    together = encode(vision, params, batch(vision, images, 16), ComputeConfig())
    np.testing.assert_allclose(together[0, : len(bare_features)], bare_features, atol=1e-4)
    for image, expected in zip(images, np.split(bare_features, [len(images[0].pieces)]), strict=True):
        alone = encode(vision, params, batch(vision, [image], 16), ComputeConfig())
        np.testing.assert_allclose(alone[0, : len(expected)], expected, atol=1e-4)


def torch_features_with_prompts(vision, encoder, image, prompts):
    """transformers' blocks with inputs before each that have no rotary position, and are dropped after it."""
    import torch

    x = encoder.patch_embed(torch.tensor(patches_of(vision, image)))
    cos, sin = encoder.rotary_pos_emb(x, torch.tensor(coordinates(vision, image.rows, image.columns)))
    count = prompts.shape[1]
    cos = torch.cat([torch.ones(count, cos.shape[1]), cos])
    sin = torch.cat([torch.zeros(count, sin.shape[1]), sin])
    for block, prompt in zip(encoder.blocks, prompts, strict=True):
        x = torch.cat([prompt, x])
        x = block(x, cu_seqlens=torch.tensor([0, len(x)]), position_embeddings=(cos, sin))[count:]
    return encoder.merger(x)


PROMPTS = random_array("prompts", (3, 5, 32), 1)


@pytest.fixture(scope="module")
def prompted(pair, images, reference):
    """Features with deep prompts, and the gradient of their squares' sum."""
    directory, vision, _ = pair

    def compute():
        import torch

        encoder, prompts = torch_model(directory).model.visual, torch.tensor(PROMPTS, requires_grad=True)
        features = torch.cat([torch_features_with_prompts(vision, encoder, image, prompts) for image in images])
        (gradient,) = torch.autograd.grad(features.square().sum(), prompts)
        return {"features": features.detach().numpy(), "gradient": gradient.numpy()}

    return reference("models/vision/qwen2_vl/prompts", compute, tolerance=1e-3)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_deep_prompts_and_their_gradient(pair, images, prompted, remat):
    _, vision, params = pair
    rows, count = batch(vision, images, 16), len(prompted["features"])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def ours(prompts):
        features = encode(vision, params, rows, ComputeConfig(remat=remat), VisionAdapter(prompts))[0, :count]
        return (features**2).sum(), features

    (_, features), gradient = ours(jnp.asarray(PROMPTS))
    np.testing.assert_allclose(features, prompted["features"], atol=1e-4)
    np.testing.assert_allclose(gradient, prompted["gradient"], atol=1e-3, rtol=1e-3)


def test_lora_in_the_encoder_is_pefts(pair, images, bare_features, reference):
    directory, vision, params = pair
    lora = {
        name: {
            "a": random_array(f"{name}.a", (vision.depth, width_in, 4), 0.1),
            "b": random_array(f"{name}.b", (vision.depth, 4, width_out), 0.1),
        }
        for name, (_, width_in, width_out) in vision.linear_shapes().items()
    }

    def compute():
        import peft
        import torch

        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=rf".*visual\.blocks.*\.({'|'.join(lora)})")
        adapted = peft.inject_adapter_in_model(config, torch_model(directory)).eval()
        changed = 0
        with torch.no_grad():
            for name, linear in adapted.named_modules():
                if hasattr(linear, "lora_A"):
                    layer, matrices = int(name.split("blocks.")[1].split(".")[0]), lora[name.split(".")[-1]]
                    linear.lora_A["default"].weight.copy_(torch.tensor(matrices["a"][layer].T.copy()))
                    linear.lora_B["default"].weight.copy_(torch.tensor(matrices["b"][layer].T.copy()))
                    changed += 1
        assert changed == vision.depth * len(lora)
        return {"features": torch_features(adapted, vision, images)}

    expected = reference("models/vision/qwen2_vl/lora", compute)["features"]
    found = encode(vision, params, batch(vision, images, 16), ComputeConfig(), VisionAdapter(lora=lora))
    np.testing.assert_allclose(found[0, : len(expected)], expected, atol=1e-4)
    assert np.abs(expected - bare_features).max() > 0.1


def tensors_of_published() -> dict[str, np.ndarray]:
    """Names and shapes of a model's parameters as transformers builds it, without their values."""
    import torch

    with torch.device("meta"):
        config = transformers.Qwen2VLConfig.from_dict(copy.deepcopy(PUBLISHED))
        model = transformers.Qwen2VLForConditionalGeneration(config)
    lines = (f"{name} {','.join(map(str, p.shape))}" for name, p in model.named_parameters())
    return {"tensors": as_bytes("\n".join(lines))}


def test_published_shapes_names_and_size(reference):
    """Of Qwen2-VL-2B: its tensors are what transformers builds, 2.21B of them as its card says."""
    vision = qwen2_vl.from_hf(PUBLISHED, PUBLISHED_PROCESSOR, "config")
    assert vision == Qwen2VLVision(width=1536, max_pixels=12845056)
    text = as_text(reference("models/vision/published/qwen2-vl-2b", tensors_of_published)["tensors"])
    theirs = {name: tuple(map(int, shape.split(","))) for name, shape in map(str.split, text.split("\n"))}
    encoder = {name: spec.file_shape for spec in param_specs(vision) for name in spec.names}
    ours = {qwen2_vl.TENSOR_NAMES.ours(name): shape for name, shape in theirs.items()}
    assert encoder == {name: shape for name, shape in ours.items() if "visual" in name}
    assert {"model.embed_tokens.weight", "model.layers.27.mlp.up_proj.weight", "model.norm.weight"} <= set(ours)
    assert sum(map(np.prod, encoder.values())) == 665_271_296
    assert sum(map(np.prod, theirs.values())) == 2_208_985_600
    assert all(qwen2_vl.TENSOR_NAMES.published(name) == qwen2_vl.TENSOR_NAMES.ours(name) == name for name in ours)
    assert set(encoder) >= {
        "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.blocks.31.attn.proj.bias",
        "visual.blocks.7.norm1.bias", "visual.blocks.7.norm2.weight", "visual.blocks.7.mlp.fc1.weight",
        "visual.blocks.7.mlp.fc2.bias", "visual.merger.ln_q.weight", "visual.merger.mlp.0.weight", "visual.merger.mlp.2.bias",
    }  # fmt: skip


def test_options_survive_transformers(pair):
    _, vision, _ = pair
    theirs = transformers.Qwen2VLConfig(text_config=TEXT, **qwen2_vl.to_hf(vision)).to_dict()
    processor = transformers.Qwen2VLImageProcessorPil(**qwen2_vl.processor_to_hf(vision)).to_dict()
    assert theirs["vision_config"] == CONFIG.to_dict()["vision_config"]
    assert qwen2_vl.from_hf(theirs, processor, "config") == vision
    assert qwen2_vl.from_hf(theirs, {"image_processor": processor}, "config") == vision
    default = qwen2_vl.from_hf(PUBLISHED, {}, "config")
    size = transformers.Qwen2VLImageProcessorPil().size
    assert (default.min_pixels, default.max_pixels) == (size.shortest_edge, size.longest_edge)


@pytest.mark.parametrize(
    "change, processor, message",
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
def test_unsupported_files_are_refused_by_name(change, processor, message):
    raw = copy.deepcopy(PUBLISHED)
    for key, value in change.items():
        *above, last = key.split(".")
        (raw[above[0]] if above else raw)[last] = value
    with pytest.raises(UserError, match=f"^here: .*{message}.*; .+"):
        qwen2_vl.from_hf(raw, processor, "here")


def reassembled(vision, one):
    """The pixels [rows · patch, columns · patch, 3] of an image's patches."""
    side = vision.patch_size
    whole = np.empty((one.rows * side, one.columns * side, 3), np.uint8)
    patches = one.pieces.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    for (row, column), patch in zip(coordinates(vision, one.rows, one.columns) * side, patches, strict=True):
        whole[row : row + side, column : column + side] = patch
    return whole


def processor_of(vision):
    return transformers.Qwen2VLImageProcessorPil(**qwen2_vl.processor_to_hf(vision))


def check_same_pixels(vision, image):
    """Ours is theirs, and `pixels.normalize`, which runs on the device, does what NumPy does."""
    theirs = processor_of(vision)(image, return_tensors="np")
    one = preprocess_image(vision, rgb(image))
    assert theirs["image_grid_thw"].tolist() == [[1, one.rows, one.columns]] and one.pieces.dtype == np.uint8
    np.testing.assert_allclose(patches_of(vision, one), theirs["pixel_values"], atol=1e-5)
    return one


@pytest.mark.parametrize("size", [(31, 18), (300, 20), (1, 1), (1, 200), (64, 64), (2000, 1500)])
def test_pixels(pair, size):
    """Patches are the processor's, and at their coordinates they make the resized image."""
    vision, image = pair[1], noise(*size)
    one = check_same_pixels(vision, image)
    resized = image.resize((one.columns * 4, one.rows * 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(reassembled(vision, one), np.asarray(resized))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_images_of_any_size(width, height):
    vision = Qwen2VLVision(width=1, patch_size=4, min_pixels=64, max_pixels=4096)
    image = Image.new("RGB", (width, height), "red")
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(UserError, match="200 times"):
            preprocess_image(vision, image)
        return
    try:
        one = check_same_pixels(vision, image)
    except UserError as error:  # transformers goes beyond its bound
        assert "too elongated for 4096 pixels" in str(error) and max(width, height) > 64 * min(width, height)
        return
    assert 64 <= one.rows * one.columns * 16 <= 4096


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "YCbCr", "LA", "F"])
def test_every_image_mode(mode):
    check_same_pixels(
        Qwen2VLVision(width=1), Image.new("LA", (30, 20), (9, 99)) if mode == "LA" else noise(30, 20, mode)
    )


@pytest.mark.parametrize("size", [(3, 700), (700, 3), (0, 5), (0, 0)])
def test_images_of_extreme_shapes_are_refused(size):
    with pytest.raises(UserError, match=f"{size[0]} × {size[1]} pixels: .*; crop it"):
        preprocess_image(Qwen2VLVision(width=1), Image.new("RGB", size))


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
    ones = [preprocess_image(vision, image) for image in images]
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


def random_rows(count: int) -> list[list[tuple]]:
    """Packed rows of sequences (images, text after them, branches); an image is (text before it, (rows, columns))."""
    rng = np.random.default_rng(0)

    def sequence():
        images = [(int(rng.integers(1, 6)), tuple(rng.integers(1, 7, 2).tolist())) for _ in range(rng.integers(0, 4))]
        return images, int(rng.integers(1, 6)), rng.integers(1, 4, rng.integers(0, 3)).tolist()

    return [[sequence() for _ in range(rng.integers(1, 4))] for _ in range(count)]


ROWS, V = random_rows(60), 60


def torch_positions(directory) -> dict[str, np.ndarray]:
    """Positions of every sequence with each of its branches, as transformers has them, one after the other."""
    import torch

    model, positions = torch_model(directory).model, []
    for images, after, branches in (sequence for row in ROWS for sequence in row):
        trunk = [token for words, (down, across) in images for token in [1] * words + [V] * (down * across)]
        for size in branches or [0]:
            ids = torch.tensor([trunk + [1] * (after + size)])
            grid = torch.tensor([[1, 2 * down, 2 * across] for _, (down, across) in images])
            found, _ = model.get_rope_index(ids, (ids == V).int(), image_grid_thw=grid if images else None)
            positions.append(found[:, 0].numpy().T)
    return {"positions": np.concatenate(positions).astype(np.int32)}


def test_positions_of_text_and_images(pair, reference):
    """Sequences of a packed row: in each images with text before and after them, and then branches."""
    directory, vision, _ = pair
    expected = reference("models/vision/qwen2_vl/positions", lambda: torch_positions(directory))["positions"]
    run, start = jax.jit(mrope_positions, static_argnums=3), 0
    for sequences in ROWS:
        columns = []  # (token, position, segment) of the row
        offsets = [np.zeros((0, 4), np.int32)]
        branch_columns, features = [], 0
        for segment, (images, after, branches) in enumerate(sequences, 1):
            trunk = []
            for words, (down, across) in images:
                trunk += [1] * words + [V + features + k for k in range(down * across)]
                offsets.append(mrope_offsets(vision, down * vision.merge, across * vision.merge))
                features += down * across
            trunk += [1] * after
            first = len(columns)
            columns += [(token, k, segment) for k, token in enumerate(trunk)]
            for size in branches or [0]:
                branch = range(len(columns), len(columns) + size)
                columns += [(1, len(trunk) + k, segment) for k in range(size)]
                branch_columns.append([*range(first, first + len(trunk)), *branch])
        row, table = np.zeros((512, 3), np.int32), np.zeros((512, 4), np.int32)
        row[: len(columns)], table[:features] = columns, np.concatenate(offsets)
        ours = np.asarray(run(*row.T[:, None], V, table[None]))
        for chosen in branch_columns:
            np.testing.assert_array_equal(ours[0, chosen], expected[start : start + len(chosen)])
            start += len(chosen)
    assert start == len(expected)
