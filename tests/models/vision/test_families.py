"""Students that see, as wholes: logits, packed rows, likelihood and text, against transformers' PyTorch models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sqa_jax.batches.batch import stack_rows
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
from tests.support.vision_pair import MODELS, VisionPair

MESH = make_mesh(default().mesh, jax.devices()[:1])
SIZES = ((50, 40), (200, 60), (28, 90))  # widths and heights of three pictures
RNG = np.random.default_rng(0)


def words(count):
    return RNG.integers(4, 250, count).tolist()


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    """A pair with `pictures`, and `prompts`: one picture, two of them, the same one again, and none."""
    own = VisionPair(request.param, tmp_path_factory.mktemp("vision"))
    own.shown = own.images(tmp_path_factory.mktemp("pictures"), *SIZES)
    one, two, three = (own.shown.prompt_ids(str(k), own.student.tokenizer) for k in range(3))
    own.prompts = [one + words(9), words(3) + three + words(4) + two + words(6), one + words(5), words(17)]
    return own


def likelihoods(pair, prompt, option):
    """Of an option's tokens behind a prompt, by PyTorch."""
    ids = prompt + option
    with torch.no_grad():
        logits = pair.model(**pair.theirs(ids, pair.shown, len(prompt))).logits[0].log_softmax(-1).numpy()
    return logits[np.arange(len(prompt) - 1, len(ids) - 1), option]


def test_packed_rows_have_the_reference_loss(pair):
    """Sequences with one, two, the same and no pictures share rows; the loss is the targets' likelihood in PyTorch."""
    targets = [words(n) for n in (4, 7, 3, 5)]
    sequences = [prompt + target for prompt, target in zip(pair.prompts, targets, strict=True)]
    config, rows = pair.student.config, ImageBatcher(pair.shown)
    lengths = np.array(list(map(len, pair.prompts)))
    packed = pack_sequences(sequences, lengths, list("abcd"), 400, 0, 0, config.prefix_lm, rows)
    made = [packed[k] for k in range(packed.rows_of_epoch(0))]
    batch = jax.tree.map(jnp.asarray, stack_rows(made))
    settings, decoder = default().adapter, Decoder(config)
    losses = jax.jit(lambda base, batch: row_losses(settings, decoder, {}, base, batch, None))(
        pair.student.params, batch
    )
    expected = [likelihoods(pair, *one).sum() for one in zip(pair.prompts, targets, strict=True)]
    np.testing.assert_allclose(losses.sum(), -np.sum(expected), rtol=1e-5)
    # The same from features that are known beforehand.
    known = jax.jit(lambda base, images: encode_images(config.vision, base["vision"], images.encoder, ComputeConfig()))(
        pair.student.params, batch
    )
    rest = batch._replace(images=batch.images._replace(encoder=None, features=known))
    np.testing.assert_allclose(
        jax.jit(lambda base, batch: row_losses(settings, decoder, {}, base, batch, None))(pair.student.params, rest),
        losses,
        rtol=1e-5,
    )


def test_options_are_scored_as_by_the_reference(pair):
    options = [[7, 8, 9], [7, 8, 30, 31], [90]]
    scorer = LikelihoodScorer(default().adapter, Decoder(pair.student.config), MESH, 512, 2, ImageBatcher(pair.shown))
    found = dict(scorer({}, pair.student.params, [MultipleChoice(prompt, options) for prompt in pair.prompts]))
    for index, prompt in enumerate(pair.prompts):
        for option, ours in zip(options, found[index], strict=True):
            np.testing.assert_allclose(ours, likelihoods(pair, prompt, option)[-len(ours) :], atol=1e-4)


def greedy(pair, prompt, count):
    with torch.no_grad():
        out = pair.model.generate(
            **pair.theirs(prompt, pair.shown, len(prompt)), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_greedy_texts_are_the_reference_s(pair):
    """More prompts than rows: the cache's rows, and what pictures do to positions, are handed on."""
    free = [greedy(pair, prompt, 12) for prompt in pair.prompts]
    end = next(text[4] for text in free if text[4] not in text[:4])
    generator = Generator(
        default().adapter, Decoder(pair.student.config), MESH, (end,), 12, 2, images=ImageBatcher(pair.shown)
    )
    found = dict(generator({}, pair.student.params, pair.prompts))
    assert found == {k: trim(np.asarray(text), (end,)) for k, text in enumerate(free)}


def test_saved_weights_are_the_same_model_to_transformers(pair, tmp_path):
    """config.json, tensors' names and preprocessor_config.json, read back by PyTorch and by us."""
    save_safetensors(pair.student.params, pair.student.config, tmp_path / "saved")
    again, report = type(pair.model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = pair.prompts[1]
    with torch.no_grad():
        one, other = (model(**pair.theirs(ids, pair.shown, len(ids))).logits for model in (pair.model, again.eval()))
    torch.testing.assert_close(one, other)
    assert from_hf(to_hf(pair.student.config), "again") == pair.student.config
