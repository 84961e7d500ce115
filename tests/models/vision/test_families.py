"""Vision-language models as wholes: logits, packed rows, likelihood and text against transformers' PyTorch models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig

from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.loader import pack_sequences
from sqa_jax.checkpoints.hf_config import from_hf, to_hf
from sqa_jax.checkpoints.weights import save_safetensors
from sqa_jax.config import default
from sqa_jax.inference.generate import Generator, trim
from sqa_jax.inference.likelihood import LikelihoodScorer, MultipleChoice
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.vision.adapter import ComputeConfig
from sqa_jax.models.vision.encode import encode_images
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.training.loss import row_losses
from tests.support.torch_models import torch_model
from tests.support.vision_pair import CONFIGS, VisionPair

MESH = make_mesh(default().mesh, jax.devices()[:1])
SIZES = ((50, 40), (200, 60), (28, 90))  # widths and heights of three images
OPTIONS = [[7, 8, 9], [7, 8, 30, 31], [90]]


def words(seed, count):
    return np.random.default_rng(seed).integers(4, 250, count).tolist()


TARGETS = [words(10 + n, n) for n in (4, 7, 3, 5)]


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """A pair with `shown`, images, and `prompts`: of one image, two, the first one again, and none."""
    pair = VisionPair(request.param, tmp_path_factory.mktemp("vision"))
    pair.shown = pair.images(tmp_path_factory.mktemp("images"), *SIZES)
    one, two, three = (pair.shown.prompt_ids(str(k), pair.student.tokenizer) for k in range(3))
    pair.prompts = [
        one + words(0, 9), words(1, 3) + three + words(2, 4) + two + words(3, 6), one + words(4, 5), words(5, 17),
    ]  # fmt: skip
    return pair


def log_likelihoods(pair, prompt, option):
    """Of an option's tokens after a prompt, by PyTorch."""
    import torch

    ids = prompt + option
    logits = torch.tensor(pair.logits(ids, pair.shown, len(prompt))).log_softmax(-1).numpy()
    return logits[np.arange(len(prompt) - 1, len(ids) - 1), option]


def test_packed_rows_have_the_reference_loss(pair, reference):
    """Sequences with one, two, the same and no images share rows; the loss is the targets' likelihood in PyTorch."""
    expected = reference(
        f"models/vision/families/{pair.family}_loss",
        lambda: {"sums": [log_likelihoods(pair, *one).sum() for one in zip(pair.prompts, TARGETS, strict=True)]},
        tolerance=1e-3,
    )["sums"]
    sequences = [prompt + target for prompt, target in zip(pair.prompts, TARGETS, strict=True)]
    config, batcher = pair.student.config, ImageBatcher(pair.shown)
    lengths = np.array(list(map(len, pair.prompts)))
    packed = pack_sequences(sequences, lengths, list("abcd"), 400, 0, 0, config.prefix_lm, batcher)
    rows = [packed[k] for k in range(packed.rows_of_epoch(0))]
    batch = jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *rows)
    settings, decoder = default().adapter, Decoder(config)
    loss = jax.jit(lambda base, batch: row_losses(settings, decoder, {}, base, batch, None))
    losses = loss(pair.student.params, batch)
    np.testing.assert_allclose(losses.sum(), -np.sum(expected), rtol=1e-5)
    # The same from cached features.
    features = jax.jit(
        lambda base, images: encode_images(config.vision, base["vision"], images.encoder, ComputeConfig())
    )(pair.student.params, batch.images)
    cached = batch._replace(images=batch.images._replace(encoder=None, features=features))
    np.testing.assert_allclose(loss(pair.student.params, cached), losses, rtol=1e-5)


def test_options_are_scored_as_by_the_reference(pair, reference):
    expected = reference(
        f"models/vision/families/{pair.family}_options",
        lambda: {
            f"{index}_{k}": log_likelihoods(pair, prompt, option)
            for index, prompt in enumerate(pair.prompts)
            for k, option in enumerate(OPTIONS)
        },
        tolerance=1e-4,
    )
    scorer = LikelihoodScorer(default().adapter, Decoder(pair.student.config), MESH, 512, 2, ImageBatcher(pair.shown))
    found = dict(scorer({}, pair.student.params, [MultipleChoice(prompt, OPTIONS) for prompt in pair.prompts]))
    for index in range(len(pair.prompts)):
        for k, ours in enumerate(found[index]):
            np.testing.assert_allclose(ours, expected[f"{index}_{k}"][-len(ours) :], atol=1e-4)


def greedy(pair, prompt, count):
    import torch

    with torch.no_grad():
        out = pair.model.generate(
            **pair.model_inputs(prompt, pair.shown, len(prompt)), max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_greedy_texts_are_the_reference_s(pair, reference):
    """More prompts than rows: the cache's rows, and the positions that images advance, are handed on."""
    free = reference(
        f"models/vision/families/{pair.family}_greedy",
        lambda: {"texts": [greedy(pair, prompt, 12) for prompt in pair.prompts]},
    )["texts"].tolist()
    end = next(text[4] for text in free if text[4] not in text[:4])
    generator = Generator(
        default().adapter, Decoder(pair.student.config), MESH, (end,), 12, 2, images=ImageBatcher(pair.shown)
    )
    found = dict(generator({}, pair.student.params, pair.prompts))
    assert found == {k: trim(np.asarray(text), (end,)) for k, text in enumerate(free)}


def test_saved_weights_are_the_checkpoint(pair, tmp_path):
    """The same tensors under the same names, and the same configuration to transformers and to us."""
    save_safetensors(pair.student.params, pair.student.config, tmp_path / "saved")
    saved, original = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", pair.path))
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor)
    again, first = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "saved", pair.path))
    assert again["model_type"] == first["model_type"] and again["vision_config"] == first["vision_config"]
    assert from_hf(to_hf(pair.student.config), "again") == pair.student.config


@pytest.mark.live
def test_saved_weights_are_the_same_model_to_transformers(pair, tmp_path):
    """config.json, tensors' names and preprocessor_config.json, read by PyTorch."""
    save_safetensors(pair.student.params, pair.student.config, tmp_path / "saved")
    ids = pair.prompts[1]
    saved = pair.logits(ids, pair.shown, len(ids), torch_model(tmp_path / "saved"))
    np.testing.assert_array_equal(saved, pair.logits(ids, pair.shown, len(ids)))
