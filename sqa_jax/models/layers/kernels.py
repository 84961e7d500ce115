"""Attention in one kernel, where the platform has one: splash attention on TPUs, cuDNN's on GPUs.

The scores of a row, [H, T, T], then never exist in memory. Each gives what `attend` gives under `visibility`;
a row's padding, which nobody reads, may differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.layers.blockwise_attention import SAVED
from sqa_jax.parallel.mesh import BATCH

# (query [B, T, H, d], key, value [B, T, K, d], segments [B, T], visible [B, T, T], whether that is a window's) →
# [B, T, H, d]
FusedAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | bool], jax.Array]

_LANES, _BLOCK = 128, 512  # width of a TPU's vector registers, and the longest block of queries or keys
KERNELS = ("auto", "plain", "splash", "cudnn")


def fused_attention(name: str, student: DecoderConfig, dtype: Any, mesh: Mesh) -> FusedAttention | None:
    """The kernel for whole packed rows, or None for plain attention.

    Args:
      name: `config.student.attention`; "auto" is what the mesh's platform has for this type of numbers.
      dtype: of the computation.

    Raises:
      UserError: the name is not known, or the kernel cannot run there.
    """
    platform = mesh.devices.flat[0].platform
    if name not in KERNELS:
        raise UserError(f"config.student.attention is {name!r}; choose one of {', '.join(KERNELS)}")
    if name == "auto":
        # cuDNN multiplies numbers of 16 bits only, in heads of 8, 16, … 128, and bounds no scores.
        cudnn = platform == "gpu" and dtype == jnp.bfloat16 and student.head_dim % 8 == 0 and student.head_dim <= 128
        cudnn &= not student.attention_softcap
        name = "splash" if platform == "tpu" else "cudnn" if cudnn else "plain"
    if name == "cudnn":
        if platform != "gpu" or dtype != jnp.bfloat16:
            raise UserError(
                f"config.student.attention=cudnn needs a GPU and bfloat16, and this is {dtype} on {platform}; use auto"
            )
        if student.attention_softcap:
            raise UserError(
                f"config.student.attention=cudnn cannot bound scores by {student.attention_softcap:g}, as this student does; use auto"
            )
        return _cudnn
    if name == "splash":
        # Elsewhere than on TPUs the kernel is interpreted, which is only good for checking it.
        return functools.partial(_splash, mesh, platform != "tpu", student.window, student.attention_softcap)
    return None


def _cudnn(query, key, value, segments, visible, windowed):
    """cuDNN's flash attention; the mask is its bias, [B, 1, T, T]."""
    return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], implementation="cudnn")


def _splash(mesh: Mesh, interpret: bool, window: int, softcap: float, query, key, value, segments, visible, windowed):
    """Splash attention (JAX's Pallas kernel), row by row; blocks of keys that no query sees are never read.

    Rows lie on the mesh's data axes, heads on `tensor` where it divides the key heads.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H, d = query.shape[1:]
    K = key.shape[2]
    pad = -T % _LANES
    length = T + pad
    block = next(size for size in range(_BLOCK, 0, -_LANES) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    rows = BATCH if mesh.size > 1 else None
    heads = "tensor" if K % mesh.shape["tensor"] == 0 else None

    def local(mask, query, key, value, segments):
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[1]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=softcap or None, residual_checkpoint_name=SAVED, interpret=interpret,
        )  # fmt: skip
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(
            query, key, value, segments
        )

    def prepared(x):  # [B, T, heads, d] → [B, heads, length, d]
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    split = P(rows, heads, None, None)

    def run(mask):
        return jax.shard_map(
            functools.partial(local, mask), mesh=mesh, in_specs=(split, split, split, P(rows, None)), out_specs=split,
            check_vma=False,
        )  # fmt: skip

    everything = run(masks.CausalMask((length, length)))
    arrays = (prepared(query * d**-0.5), prepared(key), prepared(value), jnp.pad(segments, ((0, 0), (0, pad))))
    if 0 < window < T:  # a row's sequences lie whole, so places are as far apart as positions
        lately = run(masks.LocalMask((length, length), (window - 1, 0), 0))
        out = jax.lax.cond(windowed, lately, everything, *arrays)
    else:
        out = everything(*arrays)
    return out.transpose(0, 2, 1, 3)[:, :T]
