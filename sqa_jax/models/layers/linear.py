"""Linear layers with LoRA, RMS norms, the scan over layers with rematerialisation, and batch sharding constraints."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from sqa_jax.models.layers.blockwise_attention import SAVED

LINEAR = "linear"  # name under which rematerialisation keeps a linear layer's result, LoRA included

KV = "kv"  # Flax collection into which layers sow their keys and values, for prefill
# Rematerialisation (remat): what the backward pass recomputes. "full" keeps only each layer's input; "dots" keeps the
# results of the linear layers and of attention; "none" keeps everything.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR, SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def constrain_batch_sharding(x: Float[Array, "B ..."], sharding: NamedSharding | None) -> Float[Array, "B ..."]:
    """Constrains the batch dimension of activations to `sharding`; None is no constraint.

    Without it, before layers whose weights are sharded over the batch's mesh axes (fsdp), the compiler may shard
    activations by their width and add an all-reduce after each layer.
    """
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def scan_layers(block: type[nn.Module], depth: int, remat: str) -> Any:
    """`depth` blocks as one module that scans over stacked parameters: called with (carry, inputs per layer, shared).

    What a block sows into the collection `KV` is stacked, too.

    Args:
      remat: a key of `REMAT_POLICIES`.
    """
    if remat != "none":
        # Inside a scan, common-subexpression elimination cannot undo the recomputation.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, KV: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=depth,
    )


@jax.custom_vjp
def lora_matmul(x: Float[Array, "N width_in"], w: Float[Array, "width_in width_out"]) -> Float[Array, "N width_out"]:
    """x w for a low-rank w, with a gradient of w that CPUs compute three to eight times faster.

    It contracts the N tokens, and CPUs want the contracted dimension last in the first factor: the narrower of the two is
    transposed in memory, which costs little.
    """
    return x @ w


def _lora_forward(x, w):
    return x @ w, (x, w)


def _lora_backward(saved, dy):
    x, w = saved
    if w.shape[0] < w.shape[1]:
        dw = jax.lax.optimization_barrier(x.T) @ dy
    else:
        dw = (jax.lax.optimization_barrier(dy.T) @ x).T
    return dy @ w.T, dw


lora_matmul.defvjp(_lora_forward, _lora_backward)


class Linear(nn.Module):
    """y = x W (+ b), and x W + dropout(x) A B where LoRA adapts it (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

    features: int
    use_bias: bool
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch width_in"], lora: dict[str, jax.Array] | None = None
    ) -> Float[Array, "*batch width_out"]:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        # One dimension for all tokens: the backward pass of products with two (rows, tokens) takes twice as long on CPUs.
        *leading, width = x.shape
        x = x.reshape(-1, width)
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if lora is not None:
            dropped = nn.Dropout(self.lora_dropout, deterministic=not self.has_rng("dropout"))(x)
            low = lora_matmul(dropped, lora["a"].astype(self.dtype))
            y += lora_matmul(low, lora["b"].astype(self.dtype))
        return checkpoint_name(y, LINEAR).reshape(*leading, self.features)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    With `offset`, x / rms(x) · (1 + scale), as in Gemma.
    """

    epsilon: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],)).astype(jnp.float32) + self.offset
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale).astype(x.dtype)
