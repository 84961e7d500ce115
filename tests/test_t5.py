"""T5 against transformers' PyTorch T5: logits, packing, branches, cache, likelihood, generation, adapters, training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from sqa_jax.students.layout import build, leaves
from sqa_jax.students.load import load_student
from sqa_jax.students.t5 import T5, distance_buckets
from sqa_jax.students.t5_config import T5Config, from_hf
from sqa_jax.students.weights import save_safetensors

START, END = 0, 1
VARIANTS = {
    "1.1, untied, gated": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=3),
    "1.0, tied, relu": dict(feed_forward_proj="relu", num_decoder_layers=2),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path_factory):
    """A random PyTorch model and our reading of the files that it saves."""
    return make_pair(tmp_path_factory.mktemp("t5"), request.param)


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    """A pair of the newer kind, with an even number of layers."""
    return make_pair(tmp_path_factory.mktemp("flan"), {**VARIANTS["1.1, untied, gated"], "num_decoder_layers": 4})


def make_pair(directory, options):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_kv=10, d_ff=80, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, decoder_start_token_id=START, dropout_rate=0.0, **options,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(97, 48))
    with torch.no_grad():
        for name, p in model.named_parameters():  # away from the uniform start, so that a mix-up of two tensors shows
            p.add_(torch.randn_like(p) * (0.2 if "norm" in name else 0.5 if "relative" in name else 0.05))
    model.save_pretrained(directory)
    byte_tokenizer_at(directory)
    student = load_student(str(directory))
    return model, T5(student.config), student.params


def byte_tokenizer_at(directory):
    """A tokenizer of few words, that the directory may be loaded."""
    from tokenizers import Tokenizer, models

    words = ["<pad>", "</s>", "<unk>", *map(str, range(90))]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def reference(model, prompt, target):
    """Logits behind a prompt, of the start token and each token of the target: [1 + target, V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[START, *target]])).logits[0].numpy()


def pack(sequences, length, virtual=0):
    """A row of (prompt, target) sequences: (tokens, positions, segments), each [1, length], and each one's decoder span."""
    tokens, positions, segments = np.zeros((3, 1, length), int)
    place, spans = 0, []
    for number, (prompt, target) in enumerate(sequences, start=1):
        own = [0] * virtual + list(prompt) + [START] + list(target)
        span = slice(place, place + len(own))
        tokens[0, span], positions[0, span], segments[0, span] = own, np.arange(len(own)), number
        spans.append(slice(place + virtual + len(prompt), span.stop))
        place = span.stop
    return tuple(map(jnp.asarray, (tokens, positions, segments))), spans


def ids(rng, *sizes):
    return [rng.integers(2, 97, n).tolist() for n in sizes]


SEQUENCES = list(zip(ids(np.random.default_rng(0), 6, 30, 1), ids(np.random.default_rng(1), 4, 26, 0), strict=True))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (32, 100)])
def test_buckets(bidirectional, buckets, farthest):
    relative = torch.arange(-3 * farthest, 3 * farthest + 1)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, buckets, farthest).numpy()
    ours = distance_buckets(bidirectional, buckets, farthest)
    np.testing.assert_array_equal(ours[np.clip(relative.numpy(), -farthest, farthest) + farthest], theirs)


def test_logits_of_packed_sequences(pair):
    """One row of three sequences and padding; the longest are beyond the farthest distance that has a bucket."""
    model, student, params = pair
    row, spans = pack(SEQUENCES, 80)
    logits, _ = jax.jit(lambda p, *a: student.apply({"params": p}, *a, method="logits"))(params, *row)
    for (prompt, target), span in zip(SEQUENCES, spans, strict=True):
        np.testing.assert_allclose(logits[0, span], reference(model, prompt, target), atol=1e-4)
