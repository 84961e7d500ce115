"""The decoder against transformers' PyTorch models of every family: logits, cache, padding, packing, branches."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from sqa_jax.checkpoints.hf_config import from_hf
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.safetensors_source import read_hf_config
from sqa_jax.checkpoints.sources import SafetensorsSource
from sqa_jax.checkpoints.weights import read_params, save_safetensors
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.layers.kv_cache import Adaptation, init_cache
from sqa_jax.models.params import build, param_specs
from tests.support.torch_models import FAMILIES, VARIANTS, make_model

ALL = FAMILIES | VARIANTS
FEW = pytest.mark.parametrize(
    "pair", [ALL["llama"], ALL["gemma2"]], ids=["llama", "gemma2"], indirect=True
)  # what no option of a family can change is tried on the plainest and on one of the richest


@pytest.fixture(scope="module", params=ALL.values(), ids=ALL.keys())
def pair(request, tmp_path_factory):
    """A random PyTorch model and our reading of the files that it saves."""
    family, options = request.param
    model = make_model(family, **options)
    directory = tmp_path_factory.mktemp(family)
    model.save_pretrained(directory)
    ours = from_hf(read_hf_config(directory), "config")
    params = read_params(SafetensorsSource(directory), ours)
    return model, Decoder(ours), params


@partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens, positions, segments, **kwargs):
    return decoder.apply({"params": params}, tokens, positions, segments, method="logits", **kwargs)


def reference(model, tokens, positions=None, mask=None):
    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            position_ids=None if positions is None else torch.tensor(positions),
            attention_mask=None if mask is None else torch.tensor(mask),
        )
    return out.logits.numpy()


def test_logits(pair):
    model, decoder, params = pair
    tokens = np.random.default_rng(0).integers(0, 264, (3, 20))
    positions, ones = np.tile(np.arange(20), (3, 1)), np.ones((3, 20), int)
    ours, _ = run(decoder, params, tokens, positions, ones)
    np.testing.assert_allclose(ours, reference(model, tokens), atol=1e-4)


def test_cache_reads_in_pieces(pair):
    model, decoder, params = pair
    tokens = np.random.default_rng(1).integers(0, 264, (2, 16))
    expected = reference(model, tokens)
    cache = init_cache(decoder.config, 2, 20, Adaptation())
    pieces = []
    for start, stop in [(0, 11), *((k, k + 1) for k in range(11, 16))]:
        positions = np.tile(np.arange(start, stop), (2, 1))
        logits, cache = run(decoder, params, tokens[:, start:stop], positions, np.ones_like(positions), cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-4)


@FEW
def test_left_padding_and_cache_equal_reference_with_padding(pair):
    model, decoder, params = pair
    tokens = np.random.default_rng(2).integers(0, 264, (2, 12))
    mask = np.ones((2, 12), int)
    mask[0, :5] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    expected = reference(model, tokens, positions, mask)
    cache = init_cache(decoder.config, 2, 12, Adaptation())
    first, cache = run(decoder, params, tokens[:, :9], positions[:, :9], mask[:, :9], cache=cache)
    rest, _ = run(decoder, params, tokens[:, 9:], positions[:, 9:], mask[:, 9:], cache=cache)
    ours = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=1e-4)


@FEW
def test_right_padded_rows_continue_where_each_ends(pair):
    """What generation does: rows of different length in one cache, each continued behind its own end."""
    model, decoder, params = pair
    rng = np.random.default_rng(3)
    lengths = np.array([4, 9])
    tokens = rng.integers(0, 264, (2, 12))
    read = np.arange(9) < lengths[:, None]
    cache = init_cache(decoder.config, 2, 12, Adaptation())
    _, cache = run(decoder, params, tokens[:, :9], np.tile(np.arange(9), (2, 1)), read.astype(int), cache=cache)
    np.testing.assert_array_equal(cache.length, lengths)
    new = rng.integers(0, 264, (2, 2))
    for k in range(2):
        logits, cache = run(
            decoder, params, new[:, k : k + 1], (lengths + k)[:, None], np.ones((2, 1), int), cache=cache
        )
        for row in range(2):
            whole = np.concatenate([tokens[row, : lengths[row]], new[row, : k + 1]])[None]
            np.testing.assert_allclose(logits[row, 0], reference(model, whole)[0, -1], atol=1e-4)


def test_packed_segments_do_not_see_each_other(pair):
    model, decoder, params = pair
    tokens = np.random.default_rng(4).integers(0, 264, (1, 18))
    segments = np.array([[1] * 5 + [2] * 9 + [3] * 2 + [0] * 2])
    positions = np.concatenate([np.arange(n) for n in (5, 9, 2, 2)])[None]
    ours, _ = run(decoder, params, tokens, positions, segments)
    for start, stop in [(0, 5), (5, 14), (14, 16)]:
        np.testing.assert_allclose(ours[:, start:stop], reference(model, tokens[:, start:stop]), atol=1e-4)


def test_branches_see_the_trunk_and_themselves(pair):
    model, decoder, params = pair
    rng = np.random.default_rng(5)
    trunk, one, two = rng.integers(0, 264, 6), rng.integers(0, 264, 3), rng.integers(0, 264, 4)
    tokens = np.concatenate([trunk, one, two])[None]
    branches = np.array([[0] * 6 + [1] * 3 + [2] * 4])
    positions = np.concatenate([np.arange(6), 6 + np.arange(3), 6 + np.arange(4)])[None]
    ours, _ = run(decoder, params, tokens, positions, np.ones_like(tokens), branches=jnp.asarray(branches))
    np.testing.assert_allclose(ours[0, 6:9], reference(model, np.concatenate([trunk, one])[None])[0, 6:], atol=1e-4)
    np.testing.assert_allclose(ours[0, 9:], reference(model, np.concatenate([trunk, two])[None])[0, 6:], atol=1e-4)


@FEW
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(pair, remat):
    _, decoder, params = pair
    tokens = np.arange(10)[None] % 97
    positions, ones = np.arange(10)[None], np.ones((1, 10), int)

    def loss(params, d):
        logits, _ = run(d, params, tokens, positions, ones)
        return jnp.square(logits).mean()

    plain, again = (jax.grad(loss)(params, dataclasses.replace(decoder, remat=r)) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, again)


@FEW
def test_module_initialises_the_tree_that_files_are_read_into(pair):
    _, decoder, params = pair
    one = jnp.ones((1, 1), int)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), one, one, one, method="logits"))["params"]
    expected = build(decoder.config, lambda leaf: leaf.shape)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == expected
    assert len(param_specs(decoder.config)) == len(jax.tree.leaves(params))


def test_saved_weights_load_in_transformers(pair, tmp_path):
    model, decoder, params = pair
    save_safetensors(params, decoder.config, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokens = np.arange(11)[None] + 3
    np.testing.assert_allclose(reference(again, tokens), reference(model, tokens), atol=1e-6)


def test_smollm2_equals_reference(smollm2):
    """The real weights: logits and tokenizer of the GGUF file against transformers' own reading of it."""
    from pathlib import Path

    path = Path(smollm2).resolve()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    student = load_student(smollm2)
    texts = [
        "Question: Which of these states is farthest north?\nContext: N/A\nOptions: (A) Ohio (B) Maine",
        # No ½ or ² here: transformers reads this file without its pre-tokenizer, which splits at such digits.
        "  two  blanks\t\ttabs\n\n\nlines 1234567890 3.14 50% é ü ß 日本語 🎉👩‍🔬 <|im_end|> <|endoftext|>x",
        "def f(x):\n    return x**2  # CamelCase snake_case don't I'll we've",
        "",
    ]
    assert student.tokenizer(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    for turns in ([("user", "Hi")], [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"), ("user", "Why?")]):
        messages = [{"role": role, "content": text} for role, text in turns]
        kwargs = dict(tokenize=False, add_generation_prompt=True)
        assert student.tokenizer.apply_chat_template(messages, **kwargs) == tokenizer.apply_chat_template(
            messages, **kwargs
        )
    tokens = np.array([tokenizer(texts[0])["input_ids"]])
    positions = np.arange(tokens.shape[1])[None]
    ours, _ = jax.jit(lambda params, *a: run(Decoder(student.config), params, *a))(
        student.params, tokens, positions, np.ones_like(tokens)
    )
    # Logits reach 30; 1e-4 beside them is float32's own rounding, which is the same size in PyTorch.
    np.testing.assert_allclose(ours, reference(model, tokens), atol=1e-4, rtol=1e-5)
