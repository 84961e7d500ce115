"""The decoder against transformers' PyTorch models of every family: logits, KV cache, padding, packing, branches."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sqa_jax.checkpoints.hf_config import from_hf
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.safetensors_source import read_hf_config
from sqa_jax.checkpoints.sources import SafetensorsSource
from sqa_jax.checkpoints.weights import read_params, save_safetensors
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.layers.kv_cache import init_cache
from sqa_jax.models.params import build_tree, param_specs
from tests.support.torch_models import FAMILIES, VARIANTS, torch_model, write_checkpoint

ALL = FAMILIES | VARIANTS
FEW = pytest.mark.parametrize(
    "family", ["llama", "gemma2"], indirect=True
)  # what depends on no option of a family is tested with the plainest and with one of the richest

# Three sequences of T tokens, of which the third forks from the first after TRUNK tokens.
T, TRUNK = 12, 6
TOKENS = np.random.default_rng(0).integers(0, 264, (3, T))
TOKENS[2, :TRUNK] = TOKENS[0, :TRUNK]
PADDED = np.arange(T) >= np.array([[5], [0]])  # left padding of the first of two rows


class Family:
    """A random checkpoint of a family: our model of its files, and PyTorch's logits."""

    def __init__(self, name: str, directory: Path, reference):
        kind, options = ALL[name]
        self.directory = write_checkpoint(directory, kind, **options)
        config = from_hf(read_hf_config(directory), "config")
        self.decoder, self.params = Decoder(config), read_params(SafetensorsSource(directory), config)
        slug = name.replace(", ", "-").replace(" ", "-")
        self.expected = reference(f"models/decoder/{slug}", partial(logits_of_torch, directory), tolerance=5e-5)

    def logits(self, tokens, positions=None, segments=None, **kwargs):
        """(logits, cache), by default of rows of one sequence each."""
        positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)) if positions is None else positions
        segments = np.ones_like(positions) if segments is None else segments
        return run(self.decoder, self.params, tokens, positions, segments, **kwargs)


@partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens, positions, segments, **kwargs):
    return decoder.apply({"params": params}, tokens, positions, segments, method="logits", **kwargs)


def logits_of_torch(directory) -> dict[str, np.ndarray]:
    import torch

    model = torch_model(directory)
    positions = torch.tensor(np.maximum(np.cumsum(PADDED, axis=1) - 1, 0))
    with torch.no_grad():
        return {
            "logits": model(torch.tensor(TOKENS)).logits.numpy(),
            "left_padded": model(
                torch.tensor(TOKENS[:2]), attention_mask=torch.tensor(PADDED.astype(int)), position_ids=positions
            ).logits.numpy()[:, ::3],
        }


@pytest.fixture(scope="module", params=ALL)
def family(request, tmp_path_factory, reference):
    return Family(request.param, tmp_path_factory.mktemp("family") / "model", reference)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_logits(family):
    assert_close(family.logits(TOKENS)[0], family.expected["logits"])


def test_prefill_and_decode_steps_with_a_cache(family):
    cache = init_cache(family.decoder.config, 3, T + 4)
    pieces = []
    for start, stop in [(0, 8), *((k, k + 1) for k in range(8, T))]:
        positions = np.tile(np.arange(start, stop), (3, 1))
        logits, cache = family.logits(TOKENS[:, start:stop], positions, cache=cache)
        pieces.append(logits)
    assert_close(np.concatenate(pieces, axis=1), family.expected["logits"])


def test_packed_segments_and_branches_are_separate(family):
    """A row of three packed sequences and padding, and a row whose trunk is continued by two branches."""
    lengths, forked = (5, 8, 2), T - TRUNK
    packed = np.concatenate([*(TOKENS[k, :n] for k, n in enumerate(lengths)), [7, 7, 7]])
    branching = np.concatenate([TOKENS[0], TOKENS[2, TRUNK:]])
    branches = np.array([[0] * 18, [0] * TRUNK + [1] * forked + [2] * forked])
    segments = np.array([[1] * 5 + [2] * 8 + [3] * 2 + [0] * 3, [1] * 18])
    positions = np.array([[*range(5), *range(8), *range(2), 0, 0, 0], [*range(T), *range(TRUNK, T)]])
    ours, _ = family.logits(np.stack([packed, branching]), positions, segments, branches=branches)
    expected = family.expected["logits"]
    for k, start, n in zip(range(3), (0, 5, 13), lengths, strict=True):
        assert_close(ours[0, start : start + n], expected[k, :n])
    assert_close(ours[1, :T], expected[0])
    assert_close(ours[1, T:], expected[2, TRUNK:])


@FEW
def test_left_padding_with_a_cache(family):
    segments = PADDED.astype(int)
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    cache = init_cache(family.decoder.config, 2, T)
    first, cache = family.logits(TOKENS[:2, :9], positions[:, :9], segments[:, :9], cache=cache)
    rest, _ = family.logits(TOKENS[:2, 9:], positions[:, 9:], segments[:, 9:], cache=cache)
    ours = np.concatenate([first, rest], axis=1)[:, ::3]
    assert_close(ours[PADDED[:, ::3]], family.expected["left_padded"][PADDED[:, ::3]])


@FEW
def test_right_padded_rows_continue_after_their_last_token(family):
    """What generation does: prompts of different lengths in one cache."""
    lengths = np.array([4, 9])
    cache = init_cache(family.decoder.config, 2, T)
    _, cache = family.logits(TOKENS[:2, :9], segments=(np.arange(9) < lengths[:, None]).astype(int), cache=cache)
    np.testing.assert_array_equal(cache.length, lengths)
    for k in range(2):
        positions = (lengths + k)[:, None]
        logits, cache = family.logits(np.take_along_axis(TOKENS[:2], positions, axis=1), positions, cache=cache)
        assert_close(logits[:, 0], family.expected["logits"][[0, 1], lengths + k])


@FEW
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(family, remat):
    tokens = np.arange(10)[None] % 97
    positions, ones = np.arange(10)[None], np.ones((1, 10), int)

    def loss(params, decoder):
        logits, _ = run(decoder, params, tokens, positions, ones)
        return jnp.square(logits).mean()

    plain, recomputed = (
        jax.grad(loss)(family.params, dataclasses.replace(family.decoder, remat=policy)) for policy in ("none", remat)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, recomputed)


@FEW
def test_module_initialises_the_tree_of_the_parameter_table(family):
    one = jnp.ones((1, 1), int)
    shapes = jax.eval_shape(lambda: family.decoder.init(jax.random.key(0), one, one, one, method="logits"))["params"]
    expected = build_tree(family.decoder.config, lambda spec: spec.shape)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == expected
    assert len(param_specs(family.decoder.config)) == len(jax.tree.leaves(family.params))


def test_saved_weights_are_those_of_the_checkpoint(family, tmp_path):
    """The files that `test_saved_weights_load_in_transformers` reads with transformers."""
    save_safetensors(family.params, family.decoder.config, tmp_path / "out")
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", family.directory))
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    assert from_hf(read_hf_config(tmp_path / "out"), "out") == family.decoder.config


@pytest.mark.live
def test_saved_weights_load_in_transformers(family, tmp_path):
    save_safetensors(family.params, family.decoder.config, tmp_path / "out")
    np.testing.assert_allclose(logits_of_torch(tmp_path / "out")["logits"], family.expected["logits"], atol=1e-6)


TEXTS = [
    "Question: Which of these states is farthest north?\nContext: N/A\nOptions: (A) Ohio (B) Maine",
    # No ½ or ² here: transformers reads this file without its pre-tokenizer, which splits at such digits.
    "  two  blanks\t\ttabs\n\n\nlines 1234567890 3.14 50% é ü ß 日本語 🎉👩‍🔬 <|im_end|> <|endoftext|>x",
    "def f(x):\n    return x**2  # CamelCase snake_case don't I'll we've",
    "",
]
CHATS = [[("user", "Hi")], [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"), ("user", "Why?")]]


def tokenized(tokenizer) -> dict[str, np.ndarray]:
    """Ids of texts, and chats as text."""
    arrays = {f"ids_{k}": np.asarray(tokenizer(text)["input_ids"], np.int32) for k, text in enumerate(TEXTS)}
    for k, turns in enumerate(CHATS):
        messages = [{"role": role, "content": text} for role, text in turns]
        arrays[f"chat_{k}"] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return arrays


def test_smollm2_equals_reference(smollm2, reference):
    """The real weights: logits and tokenizer of the GGUF file, and as transformers reads it."""
    path, columns = Path(smollm2).resolve(), slice(None, None, 61)

    def compute():
        import torch
        import transformers

        files = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32).eval()
        arrays = tokenized(transformers.AutoTokenizer.from_pretrained(**files))
        with torch.no_grad():
            logits = model(torch.tensor(arrays["ids_0"][None].astype(int))).logits
        return {**arrays, "logits": logits.numpy()[0, :, columns]}

    expected, student = reference("models/decoder/smollm2", compute, tolerance=1e-3), load_student(smollm2)
    for key, value in tokenized(student.tokenizer).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
    tokens = expected["ids_0"][None]
    positions = np.arange(tokens.shape[1])[None]
    ours, _ = run(Decoder(student.config), student.params, tokens, positions, np.ones_like(tokens))
    # Logits reach 30; 1e-4 relative to them is float32's rounding, which is as large in PyTorch.
    np.testing.assert_allclose(ours[0, :, columns], expected["logits"], atol=1e-4, rtol=1e-5)
