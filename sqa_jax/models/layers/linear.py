"""What every student's layers are made of: linear layers with a place for LoRA, norms, and the scan that stacks them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from sqa_jax.models.layers.blockwise_attention import SAVED

LINEAR = "linear"  # name of a linear layer's result, LoRA included: one array, where the two products would be two

# What the backward pass recomputes. "full" keeps only each layer's input; "dots" keeps the results of the linear
# layers and of fused attention; "none" keeps everything.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR, SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def constrain_batch_sharding(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """An array with rows in front, which lie on the mesh as `rows` says; None says nothing.

    In front of layers whose weights are split over the rows' axis, the compiler would rather split activations by their
    width, and add them up behind each layer.
    """
    return x if rows is None else jax.lax.with_sharding_constraint(x, rows)


def scan_layers(block: type[nn.Module], depth: int, remat: str) -> type[nn.Module]:
    """`depth` blocks as one module that scans over them: called with (carry, each layer's inputs, what all share).

    Args:
      remat: a key of `REMAT_POLICIES`.
    """
    if remat != "none":
        # Inside a scan, common-subexpression elimination cannot undo the recomputation.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "read": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=depth,
    )


@jax.custom_vjp
def lora_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x w for a narrow w, [N, in] · [in, out], with a gradient of w that CPUs compute three to eight times faster.

    It contracts the N tokens, and CPUs want the contracted dimension last in the first factor: the narrower
    one of the two is laid out anew, which costs little.
    """
    return x @ w


def _narrow_forward(x, w):
    return x @ w, (x, w)


def _narrow_backward(saved, dy):
    x, w = saved
    if w.shape[0] < w.shape[1]:
        dw = jax.lax.optimization_barrier(x.T) @ dy
    else:
        dw = (jax.lax.optimization_barrier(dy.T) @ x).T
    return dy @ w.T, dw


lora_matmul.defvjp(_narrow_forward, _narrow_backward)


class Linear(nn.Module):
    """y = x W (+ b), and x W + dropout(x) A B where LoRA adapts it (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

    features: int
    use_bias: bool
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, lora: dict[str, jax.Array] | None = None) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        # Tokens in one dimension: the backward pass of products with two (rows, tokens) takes twice as long on CPUs.
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

    With `offset` by 1 + scale, as Gemma's norms.
    """

    epsilon: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],)).astype(jnp.float32) + self.offset
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale).astype(x.dtype)
