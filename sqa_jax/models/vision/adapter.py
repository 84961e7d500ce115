"""How the half of a student that sees computes, and what adapters add to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


class VisionAdapter(NamedTuple):
    """What adapters add to a tower and its connector.

    Attributes:
      prompts: [L, P, E] deep visual prompts (Jia et al. 2022, arXiv:2203.12119, VPT-Deep, eq. 5): they stand in front
        of a layer's patches and are dropped behind it.
      lora: of the tower's linear layers by name {"a": [L, in, r], "b": [L, r, out]}, the scale already in b.
      connector: of the connector's, {"a": [in, r], "b": [r, out]}.
    """

    prompts: jax.Array | None = None
    lora: dict[str, dict[str, jax.Array]] | None = None
    connector: dict[str, dict[str, jax.Array]] | None = None

    def connects(self, name: str) -> dict[str, jax.Array] | None:
        """LoRA of one of the connector's linear layers."""
        return (self.connector or {}).get(name)


NO_VISION_ADAPTER = VisionAdapter()


class ComputeConfig(NamedTuple):
    """How a tower computes.

    Attributes:
      dtype: of the computation; parameters may be of another.
      remat: a key of `sqa_jax.models.layers.linear.REMAT_POLICIES`.
      lora_dropout: rate at which LoRA's input is dropped where a "dropout" generator is given.
      rows: how a batch's rows lie on a mesh: see `sqa_jax.models.layers.linear.constrain_batch_sharding`.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0
    rows: NamedSharding | None = None
