"""Fused and blockwise attention equal plain attention: interpreted here, compiled ahead of time for the real platform."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqa_jax import adapters
from sqa_jax.checkpoints.weights import random_params
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.layers.attention import dot_product_attention
from sqa_jax.models.layers.blockwise_attention import blockwise_attention
from sqa_jax.models.layers.kernels import fused_attention
from sqa_jax.models.layers.masks import attention_mask, sliding_window_mask
from sqa_jax.parallel.mesh import make_mesh

CONFIG = DecoderConfig(64, 64, 64, 2, 4, 2, 64, tie_embeddings=True)
T = 300  # no multiple of a TPU's 128 lanes, and long enough for blocks of queries


def mesh(shape, devices=None):
    config = default()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    return make_mesh(config.mesh, devices)


def packed(rows):
    """Query, key, value, segments: eight sequences a row, and padding after them."""
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(k, (rows, T, h, CONFIG.head_dim)) for k, h in zip(keys, (4, 2, 2), strict=True)
    )
    segments = jnp.where(jnp.arange(T) < 280, jnp.arange(T) // 37 + 1, 0)[None].repeat(rows, 0)
    return query, key, value, segments


def causal_mask(segments):
    slots = jnp.broadcast_to(jnp.arange(T), segments.shape)
    return attention_mask(segments, segments, slots, slots)


def outputs_and_gradients(attention, query, key, value, segments):
    """Outputs of real tokens, and gradients of a function of them."""
    real = (segments > 0)[..., None, None]

    def loss(*qkv):
        out = jnp.where(real, attention(*qkv), 0)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    return [out, *gradients]


@pytest.mark.parametrize(
    ("shape", "softcap", "windowed"), [((1, 1, 1), 0.0, False), ((2, 2, 2), 1.5, False), ((2, 2, 2), 0.0, True)]
)
def test_splash_equals_plain_attention(shape, softcap, windowed):
    """Also with soft-capped scores, and in a layer with a sliding window."""
    query, key, value, segments = packed(4)
    student = dataclasses.replace(CONFIG, attention_softcap=softcap, window=10)
    mask, positions = causal_mask(segments), jnp.broadcast_to(jnp.arange(T), segments.shape)
    if windowed:
        mask &= sliding_window_mask(positions, positions, student.window)
    devices = mesh(shape, jax.devices()[: np.prod(shape)])
    splash = fused_attention("splash", student, jnp.float32, devices)
    ours = outputs_and_gradients(
        lambda *qkv: splash(*qkv, segments, None, jnp.asarray(windowed)), query, key, value, segments
    )
    plain = outputs_and_gradients(lambda *qkv: dot_product_attention(*qkv, mask, softcap), query, key, value, segments)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(("softcap", "causal"), [(0.0, True), (1.5, True), (1.5, False)])
def test_blockwise_attention_equals_plain_attention(softcap, causal):
    query, key, value, segments = packed(2)
    bidirectional = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    mask = causal_mask(segments) if causal else bidirectional
    ours = outputs_and_gradients(
        lambda *qkv: blockwise_attention(*qkv, mask, softcap, causal), query, key, value, segments
    )
    plain = outputs_and_gradients(lambda *qkv: dot_product_attention(*qkv, mask, softcap), query, key, value, segments)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("methods", [("lora", "prompt"), ("prefix",)])
def test_a_decoder_with_splash_is_the_same_decoder(methods):
    """With a prefix, which segments cannot express, plain attention is used."""
    config = default()
    config.adapter.methods = methods
    base = random_params(CONFIG, 0)
    adapter = adapters.init_adapter(config.adapter, CONFIG, base, 0)
    adapter = jax.tree.map(lambda leaf: leaf + 0.01, adapter)  # a new LoRA changes nothing
    segments = packed(2)[3]
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, 64)
    positions = jnp.broadcast_to(jnp.arange(T) % 37, (2, T))
    tokens = jnp.where(positions < 16, -1 - positions, tokens) if "prompt" in methods else tokens
    splash = fused_attention("splash", CONFIG, jnp.float32, mesh((1, 1, 1), jax.devices()[:1]))

    def hidden(fused):
        def read(base, adapter):
            adaptation = adapters.adapter_inputs(config.adapter, adapter, CONFIG)
            return Decoder(CONFIG, fused=fused).apply({"params": base}, tokens, positions, segments, adaptation)[0]

        return np.where((segments > 0)[..., None], jax.jit(read)(base, adapter), 0)

    np.testing.assert_allclose(hidden(splash), hidden(None), atol=2e-5)


@pytest.mark.live
def test_splash_compiles_for_a_tpu(tpu_compiler):
    """Mosaic, the TPU's own compiler, takes the kernel and its gradient, split over rows and heads."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    splash = fused_attention("auto", CONFIG, jnp.bfloat16, mesh((2, 1, 2), devices))
    query, key, value, segments = jax.eval_shape(lambda: packed(2))
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in (query, key, value)]

    def loss(query, key, value, segments):
        return splash(query, key, value, segments, None, False).astype(jnp.float32).sum()

    placed = jax.sharding.NamedSharding(mesh((2, 1, 2), devices), jax.sharding.PartitionSpec())
    compiled = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=placed).lower(*shapes, segments).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2


def test_cudnn_is_called_with_the_mask_as_its_bias(monkeypatch):
    """Lowered for a GPU that is not here: forward and backward pass are cuDNN's kernels with a bias."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from sqa_jax.models.layers.kernels import _cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    shapes = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    mask = jax.ShapeDtypeStruct((2, 256, 256), bool)
    gradient = jax.grad(lambda *a: _cudnn(*a[:3], None, a[3], False).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(gradient).trace(*shapes, mask).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in text and "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text


def test_unsupported_attention_is_refused():
    here = mesh((1, 1, 1), jax.devices()[:1])
    assert fused_attention("auto", CONFIG, jnp.float32, here) is None
    with pytest.raises(UserError, match="choose one of auto, plain, splash, cudnn"):
        fused_attention("flash", CONFIG, jnp.float32, here)
    with pytest.raises(UserError, match="needs a GPU and bfloat16, and this is float32 on cpu"):
        fused_attention("cudnn", CONFIG, jnp.dtype("float32"), here)
    capped = dataclasses.replace(CONFIG, attention_softcap=50.0)
    gpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")]))
    assert fused_attention("auto", CONFIG, jnp.bfloat16, gpu) is not None
    assert fused_attention("auto", capped, jnp.bfloat16, gpu) is None
    with pytest.raises(UserError, match="cannot soft-cap attention scores \(at 50\)"):
        fused_attention("cudnn", capped, jnp.bfloat16, gpu)
