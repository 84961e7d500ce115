"""What adapters add to a vision encoder and its connector, and how these compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float


class VisionAdapter(NamedTuple):
    """What adapters add to a vision encoder and its connector.

    Attributes:
      prompts: deep visual prompts (Jia et al. 2022, arXiv:2203.12119, VPT-Deep, eq. 5): each layer attends to them
        before its patches, and drops them after it.
      lora: of the encoder's linear layers, by name {"a": [L, in, r], "b": [L, r, out]}, the scale already in b.
      connector: of the connector's linear layers, {"a": [in, r], "b": [r, out]}.
    """

    prompts: Float[Array, "L P E"] | None = None
    lora: dict[str, dict[str, jax.Array]] | None = None
    connector: dict[str, dict[str, jax.Array]] | None = None

    def connector_lora(self, name: str) -> dict[str, jax.Array] | None:
        """LoRA of one of the connector's linear layers."""
        return (self.connector or {}).get(name)


NO_VISION_ADAPTER = VisionAdapter()


class ComputeConfig(NamedTuple):
    """How a vision encoder computes.

    Attributes:
      dtype: of the computation; parameters may be of another.
      remat: a key of `sqa_jax.models.layers.linear.REMAT_POLICIES`.
      lora_dropout: rate at which LoRA's input is dropped where a "dropout" generator is given.
      batch_sharding: how the batch dimension is sharded over a mesh, see
        `sqa_jax.models.layers.linear.constrain_batch_sharding`.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0
    batch_sharding: NamedSharding | None = None
