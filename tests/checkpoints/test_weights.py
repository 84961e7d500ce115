"""Weights of Hugging Face directories: equal to the files' and to PyTorch's, in shards and dtypes; and faults in them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from sqa_jax.checkpoints.hf_config import from_hf
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.sources import SafetensorsSource
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.checkpoints.weights import param_shapes, read_blocks, save_safetensors, write_model
from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.params import param_specs
from sqa_jax.models.rope_frequencies import Rope
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.parallel.rules import shardings
from tests.conftest import ROOT
from tests.support.torch_models import torch_model, write_checkpoint

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 1},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
}


def make(directory: Path, stored: str = "float32", **changes) -> Path:
    """A directory with a tiny random Llama and a tokenizer."""
    options = dict(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 30000.0}, rms_norm_eps=1e-5,
    )  # fmt: skip
    write_checkpoint(directory, transformers.LlamaConfig(**options | changes))
    byte_tokenizer().save_pretrained(directory)
    if stored != "float32":
        file = directory / "model.safetensors"
        tensors = {name: values.astype(stored) for name, values in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


def shard(directory: Path, parts: int = 3) -> list[Path]:
    """Splits model.safetensors into several files with an index."""
    tensors = sorted(load_file(directory / "model.safetensors").items())
    (directory / "model.safetensors").unlink()
    files, weight_map = [], {}
    for number in range(parts):
        files.append(directory / f"model-{number + 1:05}-of-{parts:05}.safetensors")
        save_file(dict(tensors[number::parts]), files[-1], metadata={"format": "pt"})
        weight_map |= {name: files[-1].name for name, _ in tensors[number::parts]}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def stored_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory in float32."""
    return {
        name: values.astype(np.float32)
        for file in sorted(directory.glob("*.safetensors"))
        for name, values in load_file(file).items()
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return str(make(tmp_path_factory.mktemp("plain") / "model"))


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def assert_equal(params: dict, tensors: dict[str, np.ndarray]) -> None:
    """Compares tensor by tensor, by the rules of Hugging Face's names rather than by our table of parameters."""
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(value.size for value in tensors.values())
    for name, value in tensors.items():
        keys = name.removeprefix("model.").split(".")
        layer = int(keys.pop(1)) if keys[0] == "layers" else None
        node = params
        for key in keys[:-1]:
            node = node[key]
        if keys[-1] == "bias":
            found = node["bias"]
        elif keys[0] == "embed_tokens":
            found = node["embedding"]
        elif "norm" in keys[-2]:
            found = node["scale"]
        else:
            found, value = node["kernel"], value.T
        np.testing.assert_array_equal(found if layer is None else found[layer], value, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_parameters_are_those_of_the_file(tmp_path, variant, sharded):
    directory = make(tmp_path / "m", **VARIANTS[variant])
    if sharded:
        shard(directory)
    student = load_student(str(directory))
    assert_equal(student.params, stored_tensors(directory))
    assert student.config.rope.theta == 30000.0 and student.config.tie_embeddings == (variant == "tied")


@pytest.mark.live
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_pytorch(tmp_path, variant):
    """Saved by transformers, also in shards."""
    model = torch_model(make(tmp_path / "m", **VARIANTS[variant]))
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for size in ("1GB", "20KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        byte_tokenizer().save_pretrained(tmp_path / size)
        assert (len(list((tmp_path / size).glob("*.safetensors"))) > 1) == (size == "20KB")
        assert_equal(load_student(str(tmp_path / size)).params, state)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_dtypes(tmp_path, stored):
    directory = make(tmp_path / "m", stored)
    tensors = stored_tensors(directory)
    assert_equal(load_student(str(directory)).params, tensors)
    half = load_student(str(directory), dtype=jnp.bfloat16).params
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    rounded = {name: values.astype(jnp.bfloat16).astype(np.float32) for name, values in tensors.items()}
    assert_equal(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), rounded)


@pytest.mark.parametrize("axes", [(1, 2, 4), (2, 4, 1), (8, 1, 1), (1, 8, 1)])
def test_read_into_shards(plain, axes):
    mesh = make_mesh(ConfigDict(dict(zip(("data", "fsdp", "tensor"), axes, strict=True))))
    wanted = {}

    def place(tree):
        wanted.update(shardings(tree, mesh))
        return wanted

    whole, parts = load_student(plain).params, load_student(plain, shardings_for=place).params
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert jax.tree.map(lambda leaf: leaf.sharding, parts) == wanted
    kernel = parts["layers"]["mlp"]["gate_proj"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 32 // axes[1], 48 // axes[2])}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_are_the_same_blocks_of_the_whole(plain, data):
    """What one process of several reads: only its rows, columns and layers, and each row once."""
    source, config = SafetensorsSource(plain), from_hf(json.loads(Path(plain, "config.json").read_text()), plain)
    spec = data.draw(st.sampled_from(param_specs(config)))
    ends = [st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True) for n in spec.shape]
    block = st.tuples(*(pair.map(lambda pair: range(*sorted(pair))) for pair in ends))
    blocks = data.draw(st.lists(block, min_size=1, max_size=3))
    (parameter,) = read_blocks(source, spec, [tuple(map(range, spec.shape))], np.float32)
    reads = []
    read = source.read
    source.read = lambda name, rows=slice(None): reads.append((name, rows)) or read(name, rows)
    for block, found in zip(blocks, read_blocks(source, spec, blocks, np.float32), strict=True):
        np.testing.assert_array_equal(found, parameter[np.ix_(*block)])
    for layer, name in enumerate(spec.names):
        sharing = [block for block in blocks if not spec.stacked or layer in block[0]]
        rows = [block[-1] if spec.transposed else block[spec.stacked] for block in sharing]
        expected = [(min(span.start for span in rows), max(span.stop for span in rows))] if rows else []
        assert [(span.start, span.stop) for other, span in reads if other == name] == expected


@pytest.mark.parametrize("devices", [1, 8])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, devices):
    """In its own process, whose peak it is; on a CPU the model is in the same memory, so 1 is the least."""
    config = DecoderConfig(2048, 1024, 4096, 8, 8, 8, 128, Rope(1e4), tie_embeddings=True)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), param_shapes(config, jnp.bfloat16))
    write_model(zeros, config, tmp_path, "bfloat16", "100MB")
    byte_tokenizer().save_pretrained(tmp_path)
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "tests.benchmarks.loading", tmp_path]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < json.loads(done.stdout)["peak"] < 1.3


def test_random_params_do_not_depend_on_their_sharding(tiny_student):
    mesh = make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    split = load_student("random:tiny", shardings_for=lambda tree: shardings(tree, mesh))
    jax.tree.map(np.testing.assert_array_equal, tiny_student.params, split.params)
    assert split.fingerprint == tiny_student.fingerprint
    kernel = split.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32, 64)}
    assert abs(float(kernel.std()) - 64**-0.5) < 0.005 and not np.array_equal(kernel[0], kernel[1])
    assert np.all(split.params["norm"]["scale"] == 1)
    other = load_student("random:tiny", seed=1, dtype=jnp.bfloat16)
    assert other.fingerprint != tiny_student.fingerprint
    assert {leaf.dtype for leaf in jax.tree.leaves(other.params)} == {jnp.dtype(jnp.bfloat16)}
    assert not np.allclose(other.params["embed_tokens"]["embedding"], tiny_student.params["embed_tokens"]["embedding"])


def test_random_weights_of_a_configuration(plain):
    student = load_student(f"random:{plain}")
    assert student.config == load_student(plain).config
    assert jax.tree.map(jnp.shape, student.params) == jax.tree.map(jnp.shape, load_student(plain).params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_weights_are_those_of_the_file(tmp_path, variant):
    directory = make(tmp_path / "m", **VARIANTS[variant])
    student = load_student(str(directory))
    save_safetensors(student.params, student.config, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, stored_tensors(tmp_path / "out"), stored_tensors(directory))


@pytest.mark.live
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_weights_are_read_by_transformers(tmp_path, variant):
    """Each of them, and none besides; the model then is the same."""
    import torch

    directory = make(tmp_path / "m", **VARIANTS[variant])
    student = load_student(str(directory))
    save_safetensors(student.params, student.config, tmp_path / "out")
    model, again = torch_model(directory), torch_model(tmp_path / "out")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.fixture(params=["float32", "bfloat16"])
def written_in_shards(request, tmp_path) -> tuple[str, Path, dict[str, np.ndarray]]:
    """(dtype, directory, tensors) of a model that we wrote in several files."""
    directory = make(tmp_path / "m", request.param)
    student = load_student(str(directory))
    (tmp_path / "out").mkdir()
    write_model(student.params, student.config, tmp_path / "out", request.param, "20KB")
    return request.param, tmp_path / "out", stored_tensors(directory)


def test_large_models_are_written_in_shards(written_in_shards):
    dtype, directory, tensors = written_in_shards
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 24_000 or len(load_file(shard)) == 1 for shard in shards)
    assert {str(values.dtype) for file in shards for values in load_file(file).values()} == {dtype}
    byte_tokenizer().save_pretrained(directory)
    assert_equal(load_student(str(directory)).params, tensors)


@pytest.mark.live
def test_shards_are_read_by_transformers(written_in_shards):
    dtype, directory, tensors = written_in_shards
    model = torch_model(directory)
    assert str(model.dtype) == f"torch.{dtype}"
    for name, values in tensors.items():
        np.testing.assert_array_equal(model.state_dict()[name].float().numpy(), values, err_msg=name)


def test_saving_never_leaves_half(tmp_path, tiny_student):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # stands for a full disk
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save_safetensors(tiny_student.params, tiny_student.config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_fingerprint_depends_on_weights_not_on_paths(copy, plain):
    before = load_student(plain).fingerprint
    assert load_student(str(copy)).fingerprint == before
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})  # same names, same size
    assert load_student(str(copy)).fingerprint != before


def test_eos_ids(copy):
    assert load_student(str(copy)).eos_ids[0] == byte_tokenizer().eos_token_id
    config = copy / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert load_student(str(copy)).eos_ids == (2, 3)
    config.write_text(json.dumps({"eos_token_id": 3000}))
    refused(str(copy), "generation_config.json", "eos_token_id 3000", "264 tokens")


def refused(path: str, *parts: str) -> str:
    """Loads, expects one line with each of `parts`, and returns it."""
    with pytest.raises(UserError) as caught:
        load_student(path)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


def test_cut_off_anywhere(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for length in np.linspace(0, len(content) - 1, 60, dtype=int):
        file.write_bytes(content[:length])
        refused(str(copy), str(file), "fetch the file again")
    last = max(load_header(content).items(), key=lambda item: item[1]["data_offsets"][1])[0]
    refused(str(copy), f"cut off: tensor {last} ends at byte {len(content):,}")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(str(copy), str(file), "not a safetensors file")


def load_header(content: bytes) -> dict:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header


def change_tensors(directory: Path, **changes) -> str:
    """Rewrites model.safetensors; None removes a tensor. Double underscores stand for dots."""
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def change_config(directory: Path, **changes) -> str:
    file = directory / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))
    return str(directory)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("model__layers__2__mlp__down_proj__weight", None, ["(32, 48) is missing"]),
        (
            "model__layers__0__self_attn__k_proj__weight",
            np.zeros((32, 32), np.float32),
            ["shape (32, 32)", "says (16, 32)"],
        ),
        ("model__vision__weight", np.zeros(3, np.float32), ["not part of the configured model"]),
        ("model__layers__0__self_attn__q_proj__bias", np.zeros(32, np.float32), ["not part of the configured model"]),
        ("model__norm__weight", np.zeros(32, np.int8), ["stored as I8", "F64, F32, F16, BF16"]),
    ],
)
def test_tensors_that_do_not_fit(copy, name, value, parts):
    refused(change_tensors(copy, **{name: value}), str(copy), name.replace("__", "."), *parts)


def test_float8_is_refused(copy):
    change_tensors(copy, model__norm__weight=np.zeros(32, ml_dtypes.float8_e4m3fn))
    refused(str(copy), "model.safetensors: tensor model.norm.weight is stored as F8_E4M3")


def test_harmless_extras(tmp_path):
    directory = make(tmp_path / "m", tie_word_embeddings=True)
    tensors = stored_tensors(directory)
    table = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(
        directory, lm_head__weight=table, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32)
    )
    assert_equal(load_student(str(directory)).params, tensors)
    refused(change_tensors(directory, lm_head__weight=table + 1), "lm_head.weight differs", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "supported: llama"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "supported: default"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
        ({"partial_rotary_factor": 0.5}, ["part of the head"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "supported: silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["'gptq'", "original weights"]),
        ({"vocab_size": "absent"}, ["'vocab_size'", "missing"]),
        ({"hidden_size": "wide"}, ["not a positive number"]),
        ({"num_attention_heads": 0, "head_dim": None}, ["not a positive number"]),
        ({"num_key_value_heads": 3}, ["4 query heads cannot share 3"]),
        ({"head_dim": 7}, ["even", "7"]),
        ({"num_hidden_layers": 4}, ["model.layers.3.", "is missing"]),
        ({"num_hidden_layers": 2}, ["model.layers.2.", "(and 8 more)", "not part of"]),
        ({"num_hidden_layers": 1 << 40}, [f"{1 << 40} layers"]),
        ({"vocab_size": 100}, ["up to 259", "100 embeddings"]),
    ],
)
def test_configurations_that_are_refused(copy, changes, parts):
    refused(change_config(copy, **changes), str(copy), *parts)


def test_missing_files(copy, tmp_path):
    sharded = Path(shutil.copytree(copy, tmp_path / "sharded"))
    shards = shard(sharded)
    content = shards[1].read_bytes()
    shards[1].unlink()
    refused(str(sharded), str(shards[1]), "shard not found", "fetch it again")
    shards[1].write_bytes(content[:-1])
    refused(str(sharded), str(shards[1]), "cut off: tensor")
    shutil.copy(shards[0], shards[1])
    refused(str(sharded), str(shards[1]), "is also in")
    shards[1].write_bytes(content)
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "model.extra": shards[2].name}}))
    refused(str(sharded), f"{shards[2]}: tensor model.extra is missing")
    for text, word in (("{", "not valid JSON"), ("[]", "no weight_map"), ('{"weight_map": {}}', "no weight_map")):
        index.write_text(text)
        refused(str(sharded), str(index), word)
    index.unlink()
    refused(str(sharded), str(sharded), "no model.safetensors", "fetch the weights in safetensors format")

    for text, word in (("{", "not valid JSON"), ("[]", "not a JSON object")):
        (copy / "config.json").write_text(text)
        refused(str(copy), "config.json", word)
    (copy / "config.json").unlink()
    refused(str(copy), f"{copy}/config.json: not found")
    refused(str(copy / "model.safetensors"), "not a .gguf file", "give the directory")
