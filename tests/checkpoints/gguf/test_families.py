"""GGUF files of every family: tiny models of transformers, written as llama.cpp's converter writes them, and read."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from sqa_jax.checkpoints.gguf.config import from_gguf
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.sources import GGUFSource
from sqa_jax.checkpoints.weights import check_source
from sqa_jax.errors import UserError
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.rope_frequencies import Rope
from tests.checkpoints.gguf.test_source import HEAD, HEADS, INNER, KV_HEADS, WIDTH, gguf_name, write
from tests.support.torch_models import torch_model, write_checkpoint

WINDOW = 5
SIZES = dict(
    rope_parameters=dict(rope_type="default", rope_theta=5e4),
    vocab_size=260,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    head_dim=HEAD,
    pad_token_id=0,
)
LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)  # fmt: skip
WIDE = 24  # heads of Gemma are not of the hidden size's width
GEMMA = dict(head_dim=WIDE, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e4))
# Of each architecture: layers, the model's own settings, its keys in GGUF, keys that its converter does not write.
FAMILIES: dict[str, tuple[int, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "llama": (2, dict(tie_word_embeddings=False, rope_parameters=dict(rope_theta=5e5, **LLAMA3)), {"rope.freq_base": 5e5}, ()),
    "qwen2": (2, dict(tie_word_embeddings=True), {}, ("rope.dimension_count",)),
    "qwen3": (2, dict(tie_word_embeddings=False), {"attention.key_length": HEAD}, ("rope.dimension_count",)),
    "smollm3": (5, dict(tie_word_embeddings=True, no_rope_layer_interval=4), {}, ()),
    "gemma": (2, GEMMA, {"attention.key_length": WIDE}, ("rope.dimension_count", "rope.freq_base")),
    "gemma2": (
        3,
        GEMMA | dict(sliding_window=WINDOW, query_pre_attn_scalar=WIDE, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        {
            "attention.key_length": WIDE,
            "attention.sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        ("rope.dimension_count", "rope.freq_base"),
    ),
    "gemma3": (
        7,
        GEMMA
        | dict(
            sliding_window=WINDOW,
            query_pre_attn_scalar=WIDE,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
        {
            "attention.key_length": WIDE,
            "attention.sliding_window": WINDOW,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        ("rope.dimension_count",),
    ),
}  # fmt: skip
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3", "gemma": "Gemma",
           "gemma2": "Gemma2", "gemma3": "Gemma3Text"}  # fmt: skip


def llama3_divisors() -> np.ndarray:
    """The tensor that llama.cpp's LlamaModel.generate_extra_tensors writes."""
    low, high = (
        LLAMA3["original_max_position_embeddings"] / LLAMA3[key] for key in ("low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for frequency in 1 / 5e5 ** (np.arange(0, HEAD, 2) / HEAD):
        length = 2 * math.pi / frequency
        smooth = (8192 / length - 1) / (4 - 1)
        divisors.append(1 if length < high else 32 if length > low else 1 / ((1 - smooth) / 32 + smooth))
    return np.array(divisors, np.float32)


class Case:
    """A model of transformers and its GGUF file."""

    def __init__(self, architecture: str, directory):
        layers, settings, keys, drop = FAMILIES[architecture]
        self.architecture, self.directory, self.layers = architecture, directory, layers
        self.config = getattr(transformers, CLASSES[architecture] + "Config")(
            **SIZES | settings, num_hidden_layers=layers
        )
        self.checkpoint = write_checkpoint(directory / "hf", self.config)
        self.tensors = load_file(self.checkpoint / "model.safetensors")
        extra = {"rope_freqs.weight": llama3_divisors()} if architecture == "llama" else {}
        self.keys = {f"{architecture}.{key}": value for key, value in {"block_count": layers, **keys}.items()}
        self.drop = tuple(f"{architecture}.{key}" for key in drop)
        self.path = write(directory / "m.gguf", self.tensors | extra, "F32", self.keys, self.drop, architecture)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("gguf"))


def test_tensors_are_those_of_the_model(case):
    source = GGUFSource(case.path)
    assert source.shapes == {name: values.shape for name, values in case.tensors.items()}
    for name, values in case.tensors.items():
        np.testing.assert_allclose(source.read(name), values, rtol=1e-6, atol=2e-7, err_msg=name)
        np.testing.assert_array_equal(source.read(name, slice(3, 9)), source.read(name)[3:9])


def rope(parameters: dict[str, Any]) -> Rope:
    if parameters["rope_type"] != "llama3":
        return Rope(parameters["rope_theta"], parameters["rope_type"], parameters.get("factor", 1.0))
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return Rope(parameters["rope_theta"], "llama3", parameters["factor"], *(parameters[key] for key in keys))


def test_configuration_is_that_of_the_model(case):
    ours, theirs = from_gguf(GGUFSource(case.path)), case.config
    gemma, windowed = case.architecture.startswith("gemma"), case.architecture in ("gemma2", "gemma3")
    assert ours.family == theirs.model_type
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads) == (case.layers, HEADS, KV_HEADS)
    assert (ours.hidden_size, ours.intermediate_size, ours.head_dim) == (WIDTH, INNER, theirs.head_dim)
    assert (ours.vocab_size, ours.max_positions) == (260, 128)
    assert ours.norm_epsilon == pytest.approx(theirs.rms_norm_eps)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    for part, name in (("qkv_bias", "q_proj"), ("output_bias", "o_proj")):
        assert getattr(ours, part) == (f"model.layers.0.self_attn.{name}.bias" in case.tensors), part
    assert ours.qk_norm == ("model.layers.0.self_attn.q_norm.weight" in case.tensors)
    assert ours.sandwich_norms == ("model.layers.0.post_feedforward_layernorm.weight" in case.tensors)
    assert (ours.activation, ours.norm_offset, ours.embedding_scale) == (
        ("gelu_tanh", True, True) if gemma else ("silu", False, False)
    )
    assert ours.attention_softcap == (getattr(theirs, "attn_logit_softcapping", None) or 0)
    assert ours.logit_softcap == (getattr(theirs, "final_logit_softcapping", None) or 0)
    assert (ours.query_scale or ours.head_dim) == getattr(theirs, "query_pre_attn_scalar", ours.head_dim)
    if windowed:
        kinds = {"sliding_attention": "window", "full_attention": "full"}
        assert ours.layer_types == tuple(kinds[kind] for kind in theirs.layer_types)
        assert {"window", "full"} == {*ours.layer_types} and ours.window == theirs.sliding_window
    elif case.architecture == "smollm3":
        assert ours.layer_types == tuple("full" if rotated else "nope" for rotated in theirs.no_rope_layers)
        assert ours.layer_types.count("nope") == 1
    else:
        assert (ours.layer_types, ours.window) == ((), 0)
    if case.architecture == "gemma3":
        assert ours.rope == rope(theirs.rope_parameters["full_attention"])
        assert ours.local_rope == rope(theirs.rope_parameters["sliding_attention"])
    else:
        assert (ours.rope, ours.local_rope) == (rope(theirs.rope_parameters), None)


# transformers does not read GGUF files of the other two.
@pytest.mark.live
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"], indirect=True)
def test_transformers_reads_the_same_tensors(case):
    import torch

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        case.directory, gguf_file="m.gguf", config=case.config, dtype=torch.float32
    ).state_dict()
    source = GGUFSource(case.path)
    for name in source.shapes:
        np.testing.assert_allclose(source.read(name), theirs[name].numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


def test_logits(case, reference):
    """Beyond the sliding window, from the file alone."""
    tokens = np.random.default_rng(0).integers(0, 260, (2, 3 * WINDOW))

    def compute() -> dict[str, np.ndarray]:
        import torch

        with torch.no_grad():
            return {"logits": torch_model(case.checkpoint)(torch.tensor(tokens)).logits.numpy()[..., ::5]}

    expected = reference(f"checkpoints/gguf/{case.architecture}", compute, tolerance=1e-4)["logits"]
    student = load_student(case.path)
    positions = np.tile(np.arange(tokens.shape[1]), (2, 1))
    inputs = map(jnp.asarray, (tokens, positions, np.ones_like(tokens)))
    ours, _ = jax.jit(partial(Decoder(student.config).apply, method="logits"))({"params": student.params}, *inputs)
    np.testing.assert_allclose(ours[..., ::5], expected, atol=1e-4)


def changed(case, keys: dict[str, Any], drop: tuple[str, ...] = (), extra: dict[str, np.ndarray] | None = None) -> str:
    """The case's file with other keys or tensors."""
    keys = {f"{case.architecture}.{key}": value for key, value in keys.items()}
    drop = tuple(f"{case.architecture}.{key}" for key in drop)
    path = case.directory / "changed.gguf"
    return write(path, case.tensors | (extra or {}), "F32", case.keys | keys, case.drop + drop, case.architecture)


def test_damage_is_named(case):
    """Each tensor that is missing or of another shape, by llama.cpp's name, before any is read; and an unknown rope."""
    source, config = GGUFSource(case.path), from_gguf(GGUFSource(case.path))
    all_shapes = dict(source.shapes)

    def refused(action, *parts: str) -> None:
        with pytest.raises(UserError) as caught:
            action()
        assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value

    for name, shape in all_shapes.items():
        stored = f"tensor {gguf_name(name, case.architecture)}"
        source.shapes = {other: kept for other, kept in all_shapes.items() if other != name}
        refused(lambda: check_source(source, config), case.path, stored, f"{shape} is missing", "fetch")
        source.shapes = all_shapes | {name: (*shape, 2)}
        refused(
            lambda: check_source(source, config), case.path, stored, f"has shape {(*shape, 2)}", str(shape), "fetch"
        )
    yarn = changed(case, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
    refused(lambda: load_student(yarn), yarn, "rope type 'yarn' is not supported", "none, linear, llama3")


@pytest.mark.parametrize("case", ["gemma2"], indirect=True)
def test_defaults_of_older_files_of_gemma2(case):
    silent = changed(case, {}, ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"))
    config = from_gguf(GGUFSource(silent))
    assert (config.window, config.attention_softcap, config.logit_softcap) == (4096, 50.0, 30.0)


@pytest.mark.parametrize("case", ["gemma3"], indirect=True)
def test_gemma3_without_a_sliding_window(case):
    config = from_gguf(GGUFSource(changed(case, {}, ("attention.sliding_window",))))
    assert (config.window, config.layer_types, config.local_rope) == (0, (), None)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_scaling_of_rotary_frequencies(case):
    divisors = llama3_divisors()
    config = from_gguf(GGUFSource(case.path))
    assert config.rope == Rope(5e5, "llama3", factor=32.0)
    np.testing.assert_allclose(config.rope.divisors(HEAD), divisors, rtol=1e-6)
    linear = changed(case, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert from_gguf(GGUFSource(linear)).rope == Rope(5e5, "linear", factor=4.0)
    assert from_gguf(GGUFSource(changed(case, {"rope.scaling.type": "none"}))).rope == Rope(5e5)

    def refused(parts: tuple[str, ...], keys: dict[str, Any], divisors: np.ndarray | None = None) -> None:
        path = changed(case, keys, extra=None if divisors is None else {"rope_freqs.weight": divisors})
        with pytest.raises(UserError) as caught:
            load_student(path)
        assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in (path, *parts)), caught.value

    tensor = ("rope_freqs.weight", "Llama 3's scaling by 32", "Hugging Face directory")
    refused(tensor, {}, divisors * np.linspace(0.999, 1, len(divisors), dtype=np.float32))
    refused(tensor, {}, divisors[1:])
    refused(tensor, {"rope.freq_base": 1e5}, divisors)
    refused(("rope_freqs.weight",), {}, np.full_like(divisors, np.nan))
    refused(("rope_freqs.weight",), {}, np.zeros_like(divisors))
    refused(("rope type 'yarn'", "none, linear, llama3"), {"rope.scaling.type": "yarn"})
    refused(("rope type 'yarn'",), {"rope.scaling.type": "yarn"}, divisors)
    refused(("rope.scaling.factor is missing",), {"rope.scaling.type": "linear"})
