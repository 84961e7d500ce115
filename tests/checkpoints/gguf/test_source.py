"""GGUF files: written here with the gguf package as llama.cpp's converter writes them, and read."""

from __future__ import annotations

import functools
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqa_jax.checkpoints.gguf.header import read_header
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.sources import GGUFSource
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.errors import UserError

HEADS, KV_HEADS, WIDTH, INNER, LAYERS, HEAD = 4, 2, 64, 96, 2, 16


def state_dict(biases: bool = False) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names and in its row order."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (260, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (WIDTH,)
        linears = {
            "self_attn.q_proj": (HEADS * HEAD, WIDTH),
            "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if biases and name.startswith("self_attn"):
                shapes[f"{layer}.{name}.bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of q and k of a Llama in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@functools.cache
def gguf_names(architecture: str) -> gguf.TensorNameMap:
    """The gguf package's own table of llama.cpp's names."""
    (number,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    return gguf.get_tensor_name_map(number, 99)


def gguf_name(name: str, architecture: str) -> str:
    """llama.cpp's name."""
    stem, _, part = name.rpartition(".")
    return gguf_names(architecture).get_name(stem) + "." + part


def converted(name: str, values: np.ndarray, architecture: str) -> np.ndarray:
    """A tensor as llama.cpp's converter of the architecture changes it (`modify_tensors`)."""
    if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
        return permute(values, HEADS if "q_proj" in name else KV_HEADS)
    return values + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else values


def metadata_of(architecture: str, keys: dict) -> dict:
    """Keys and values of a model with the byte tokenizer; `keys` replaces some."""
    vocabulary = byte_tokenizer()
    sizes = {
        "vocab_size": 260,
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.freq_base": 50000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD,
    }
    metadata = {f"{architecture}.{key}": value for key, value in sizes.items()}
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": vocabulary.eos_token_id,
        "tokenizer.ggml.padding_token_id": vocabulary.pad_token_id,
        "tokenizer.ggml.tokens": vocabulary.convert_ids_to_tokens(range(260)),
        "tokenizer.ggml.token_type": [3] * 4 + [1] * 256,
        "tokenizer.ggml.merges": ["a b"],
    }
    metadata |= keys
    tokens = metadata["tokenizer.ggml.tokens"]
    if "ab" not in tokens:  # the merge needs its result in the vocabulary: it replaces the last token
        metadata["tokenizer.ggml.tokens"] = [*tokens[:-1], "ab"]
    return metadata


def write(
    path,
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
    keys: dict | None = None,
    drop: tuple[str, ...] = (),
    architecture: str = "llama",
):
    """Writes a model with the byte tokenizer; `keys` replaces metadata and `drop` leaves some out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata_of(architecture, keys or {}).items():
        if key in drop:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, values in tensors.items():
        values = converted(name, values, architecture)
        dtype = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored_name = gguf_name(name, architecture) if name.startswith(("model.", "lm_head.")) else name
        writer.add_tensor(stored_name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def loaded(params: dict, name: str) -> np.ndarray:
    """The loaded values of a Hugging Face name, in its orientation."""
    keys, layer = name.split("."), None
    if keys[1] == "layers":
        layer = int(keys.pop(2))
    node = params
    for key in keys[1:-1]:
        node = node[key]
    (leaf,) = (
        [node[key] for key in ("embedding", "scale", "kernel") if key in node]
        if keys[-1] == "weight"
        else [node["bias"]]
    )
    values = np.asarray(leaf if layer is None else leaf[layer])
    return values.T if "kernel" in node and keys[-1] == "weight" else values


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", state_dict())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_round_trip(tmp_path, kind):
    tensors = state_dict(biases=True)
    student = load_student(write(tmp_path / "m.gguf", tensors, kind))
    quantization = gguf.GGMLQuantizationType[kind]
    for name, values in tensors.items():
        # Quantization works along rows, so it commutes with their permutation.
        expected = (
            gguf.dequantize(gguf.quants.quantize(values, quantization), quantization) if values.ndim == 2 else values
        )
        np.testing.assert_array_equal(loaded(student.params, name), expected, err_msg=name)
    assert student.config.tie_embeddings and student.config.qkv_bias and not student.config.mlp_bias
    assert (student.config.head_dim, student.config.rope.theta, student.config.num_kv_heads) == (
        HEAD,
        50000.0,
        KV_HEADS,
    )


def decodable(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        return gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind).size > 0
    except NotImplementedError:
        return False


DECODABLE = [kind.name for kind in gguf.GGMLQuantizationType if decodable(kind)]


@pytest.mark.parametrize("kind", DECODABLE)
def test_reads_every_quantization(tmp_path, kind):
    """Random bytes, as the gguf package decodes them, with the rows in Hugging Face's order."""
    assert len(DECODABLE) > 20
    number = gguf.GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 256, (HEADS * HEAD, 512 // size * width), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("llama.attention.head_count", HEADS)
    plain = {"F32": np.float32, "F16": np.float16}
    writer.add_tensor("blk.0.attn_q.weight", data.view(plain.get(kind, np.uint8)), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source, name = GGUFSource(tmp_path / "m.gguf"), "model.layers.0.self_attn.q_proj.weight"
    assert source.shapes == {name: (HEADS * HEAD, 512)}
    with np.errstate(all="ignore"):  # some of these bytes are infinities
        whole, decoded, rows = source.read(name), gguf.dequantize(data, number), source.read(name, slice(5, 40))
    np.testing.assert_array_equal(permute(whole, HEADS), decoded)
    np.testing.assert_array_equal(rows, whole[5:40])


def test_end_of_turn_also_ends_a_reply(tmp_path):
    path = write(tmp_path / "m.gguf", state_dict(), keys={"tokenizer.ggml.eot_token_id": 3})
    assert load_student(path).eos_ids == (byte_tokenizer().eos_token_id, 3)
    tokens = byte_tokenizer().convert_ids_to_tokens(range(260))
    tokens[3] = "<end_of_turn>"  # a file of Gemma names no other end than that of documents
    path = write(tmp_path / "m.gguf", state_dict(), keys={"tokenizer.ggml.tokens": tokens})
    assert load_student(path).eos_ids == (byte_tokenizer().eos_token_id, 3)


def test_untied_output_layer(tmp_path):
    tensors = state_dict() | {
        "lm_head.weight": np.random.default_rng(1).standard_normal((260, WIDTH)).astype(np.float32)
    }
    student = load_student(write(tmp_path / "m.gguf", tensors))
    assert not student.config.tie_embeddings
    np.testing.assert_array_equal(np.asarray(student.params["lm_head"]["kernel"]).T, tensors["lm_head.weight"])


@pytest.mark.live
def test_weights_equal_transformers(tmp_path):
    import torch
    import transformers

    path = write(tmp_path / "m.gguf", state_dict(), "Q8_0")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    params = load_student(path).params
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":
            np.testing.assert_allclose(loaded(params, name), values.numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


def test_rows_are_rows_of_the_whole(whole):
    source = GGUFSource(whole)
    for name in (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
    ):
        everything = source.read(name)
        for rows in (slice(0, 5), slice(7, 20), slice(30, 64)):
            np.testing.assert_array_equal(source.read(name, rows), everything[rows])


def test_header_equals_the_gguf_package(whole, smollm2):
    for path in (whole, smollm2):
        metadata, tensors = read_header(memoryview(np.memmap(path)), path)
        reader = gguf.GGUFReader(path)
        theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert metadata == theirs
        assert [(t.name, t.kind, t.offset, t.size, t.shape) for t in tensors] == [
            (t.name, t.tensor_type, t.data_offset, t.n_bytes, tuple(int(n) for n in reversed(t.shape)))
            for t in reader.tensors
        ]


def refused(path: str, *parts: str) -> str:
    """Loads, expects one line that names the file and each of `parts`, and returns it."""
    with pytest.raises(UserError) as caught:
        load_student(path)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in (path, *parts)), message
    return message


def test_cut_off_anywhere(whole, tmp_path):
    content = Path(whole).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in np.linspace(0, len(content) - 1, 60, dtype=int):
        path.write_bytes(content[:length])
        refused(str(path), "fetch it again")
    last = read_header(content, whole)[1][-1].name
    assert last in refused(str(path), "cut off: tensor")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_header_never_crashes(whole, tmp_path, data):
    content = bytearray(Path(whole).read_bytes())
    header = min(tensor.offset for tensor in read_header(bytes(content), whole)[1])
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        load_student(str(path))
    except UserError as error:
        assert str(path) in str(error)


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: values for name, values in state_dict().items() if name not in names}


def test_tensors_that_do_not_fit(tmp_path):
    path = tmp_path / "m.gguf"
    key = "model.layers.1.mlp.up_proj.weight"
    refused(write(path, without(key)), "blk.1.ffn_up.weight", "missing", "fetch")
    refused(
        write(path, state_dict() | {key: np.zeros((INNER, 32), np.float32)}),
        "blk.1.ffn_up.weight",
        "(96, 32)",
        "(96, 64)",
    )
    refused(write(path, state_dict() | {"visual": np.zeros((4, 32), np.float32)}), "tensor visual", "not part of")
    refused(write(path, state_dict(), keys={"llama.block_count": LAYERS + 1}), "blk.2.attn_norm.weight", "missing")
    refused(
        write(path, state_dict(), keys={"llama.embedding_length": 128, "llama.attention.key_length": HEAD}),
        "token_embd.weight",
        "(260, 64)",
        "(260, 128)",
    )


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"llama.rope.scaling.type": "yarn"}, ["rope type 'yarn'", "supported: none"]),
        ({"llama.attention.head_count": 3, "llama.attention.key_length": HEAD}, ["2 key/value heads"]),
        ({"llama.attention.head_count": 0}, ["not a positive number"]),
        ({"llama.expert_count": 8}, ["mixture of experts"]),
        ({"llama.rope.dimension_count": 8}, ["part of the head"]),
        ({"llama.block_count": 1 << 30}, ["1073741824 layers"]),
        ({"split.count": 3}, ["one of 3 parts", "llama-gguf-split"]),
        ({"general.alignment": 0}, ["general.alignment"]),
        ({"tokenizer.ggml.pre": "tekken"}, ["gpt2/tekken", "Hugging Face directory"]),
        ({"tokenizer.ggml.eos_token_id": 999}, ["eos_token_id is 999"]),
        ({"tokenizer.ggml.eot_token_id": 999}, ["eot_token_id 999", "260 tokens"]),
        ({"tokenizer.ggml.merges": ["nowhere near"]}, ["merges"]),
        ({"tokenizer.ggml.merges": [1, 2]}, ["merges holds no str"]),
        ({"tokenizer.ggml.token_type": ["a"]}, ["token_type holds no int"]),
    ],
)
def test_options_that_are_refused(tmp_path, keys, parts):
    refused(write(tmp_path / "m.gguf", state_dict(), keys=keys), *parts)


def test_missing_keys(tmp_path):
    for key in ("llama.feed_forward_length", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        refused(write(tmp_path / "m.gguf", state_dict(), drop=(key,)), key, "missing")
    refused(
        write(tmp_path / "m.gguf", state_dict(), drop=("tokenizer.ggml.eos_token_id",)), "no end token", "eos_token"
    )
    optional = ("llama.vocab_size", "llama.attention.head_count_kv", "llama.rope.dimension_count")
    heads = {"llama.attention.head_count": KV_HEADS, "llama.attention.key_length": HEAD}
    tensors = {
        k: v[: KV_HEADS * HEAD] if "q_proj" in k else v[:, : KV_HEADS * HEAD] if "o_proj" in k else v
        for k, v in state_dict().items()
    }
    path = write(tmp_path / "m.gguf", tensors, keys=heads, drop=optional)
    assert load_student(path).config.num_kv_heads == KV_HEADS


def test_not_a_model(tmp_path):
    page = tmp_path / "page.gguf"
    page.write_text("<html>404</html>")
    refused(str(page), "not a GGUF file")
    refused(str(tmp_path / "absent.gguf"), "bash launch/fetch_student.sh")
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    other.add_uint32("mamba.block_count", 1)
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    refused(str(tmp_path / "other.gguf"), "'mamba'", "supported: llama")


def test_undecodable_quantization(whole, tmp_path):
    content = bytearray(Path(whole).read_bytes())
    name = b"blk.0.ffn_up.weight"
    kind = content.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and both of them
    assert content[kind : kind + 4] == b"\0\0\0\0"  # F32
    path = tmp_path / "kind.gguf"
    for number, parts in ((24, ["I8", "cannot decode"]), (250, ["unknown type 250"])):
        content[kind] = number
        path.write_bytes(content)
        refused(str(path), "blk.0.ffn_up.weight", *parts)
