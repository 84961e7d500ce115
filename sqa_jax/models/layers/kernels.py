"""Fused attention kernels: splash attention (Pallas) on TPUs, cuDNN's flash attention on GPUs.

The scores of a row, [H, T, T], never exist in memory. Each equals `sqa_jax.models.layers.attention` under
`sqa_jax.models.layers.masks.attention_mask`; padding, whose results are not used, may differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sqa_jax.errors import UserError
from sqa_jax.models.layers.blockwise_attention import SAVED
from sqa_jax.parallel.mesh import BATCH

# (query [B, T, H, d], key, value [B, T, K, d], segments [B, T], mask [B, T, T], whether that is a sliding window's) →
# [B, T, H, d]
FusedAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | bool], jax.Array]

_LANES, _BLOCK = 128, 512  # width of a TPU's vector registers, and the longest block of queries or keys
KERNELS = ("auto", "plain", "splash", "cudnn")


class AttentionConfig(Protocol):
    """What a kernel depends on of a model's configuration."""

    @property
    def head_dim(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def attention_softcap(self) -> float: ...


def fused_attention(name: str, config: AttentionConfig, dtype: Any, mesh: Mesh) -> FusedAttention | None:
    """The kernel for whole packed rows, or None for plain attention.

    Args:
      name: `config.student.attention`; "auto" is what the mesh's platform has for this dtype.
      dtype: of the computation.

    Raises:
      UserError: the name is unknown, or the kernel does not run on this platform.
    """
    platform = mesh.devices.flat[0].platform
    if name not in KERNELS:
        raise UserError(f"config.student.attention is {name!r}; choose one of {', '.join(KERNELS)}")
    if name == "auto":
        # cuDNN has 16-bit types only, heads of 8, 16, … 128, and no logit soft-capping.
        cudnn = platform == "gpu" and dtype == jnp.bfloat16 and config.head_dim % 8 == 0 and config.head_dim <= 128
        cudnn &= not config.attention_softcap
        name = "splash" if platform == "tpu" else "cudnn" if cudnn else "plain"
    if name == "cudnn":
        if platform != "gpu" or dtype != jnp.bfloat16:
            raise UserError(
                f"config.student.attention=cudnn needs a GPU and bfloat16, and this is {dtype} on {platform}; use auto"
            )
        if config.attention_softcap:
            raise UserError(
                f"config.student.attention=cudnn cannot soft-cap attention scores (at {config.attention_softcap:g}), as this student does; use auto"
            )
        return _cudnn
    if name == "splash":
        # On other platforms the kernel is interpreted, which is only good for checking it.
        return functools.partial(_splash, mesh, platform != "tpu", config.window, config.attention_softcap)
    return None


def _cudnn(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K d"],
    segments: Int[Array, "B T"] | None,
    mask: Bool[Array, "B T T"],
    windowed: jax.Array | bool,
) -> Float[Array, "B T H d"]:
    """cuDNN's flash attention; the mask is its bias, [B, 1, T, T]."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="cudnn")


def _splash(
    mesh: Mesh,
    interpret: bool,
    window: int,
    softcap: float,
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T K d"],
    value: Float[Array, "B T K d"],
    segments: Int[Array, "B T"],
    mask: Bool[Array, "B T T"] | None,
    windowed: jax.Array | bool,
) -> Float[Array, "B T H d"]:
    """Splash attention (JAX's Pallas kernel), row by row; blocks of keys that are masked for all queries are skipped.

    The batch dimension is sharded over the mesh's data axes, heads over `tensor` where it divides the key heads.
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

    def one_shard(mask, query, key, value, segments):
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[1]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=softcap or None, residual_checkpoint_name=SAVED, interpret=interpret,
        )  # fmt: skip
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(
            query, key, value, segments
        )

    def padded(x):  # [B, T, heads, d] → [B, heads, length, d]
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    spec = P(rows, heads, None, None)

    def kernel_with(mask) -> Callable[..., Any]:
        return jax.shard_map(
            functools.partial(one_shard, mask), mesh=mesh, in_specs=(spec, spec, spec, P(rows, None)), out_specs=spec,
            check_vma=False,
        )  # fmt: skip

    full = kernel_with(masks.CausalMask((length, length)))
    arrays = (padded(query * d**-0.5), padded(key), padded(value), jnp.pad(segments, ((0, 0), (0, pad))))
    if 0 < window < T:  # sequences are contiguous in a row, so slots are as far apart as positions
        local = kernel_with(masks.LocalMask((length, length), (window - 1, 0), 0))
        out = jax.lax.cond(windowed, local, full, *arrays)
    else:
        out = full(*arrays)
    return out.transpose(0, 2, 1, 3)[:, :T]
