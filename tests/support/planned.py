"""The student, data and configuration that tests of `sqa_jax.plan` share."""

from __future__ import annotations

from typing import Any

from sqa_jax.batches.packing import Limits
from sqa_jax.config import default
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.plan.epoch_stats import EpochStats

# Nearly whole tiles, so that there is little padding; a vocabulary that four does not divide.
STUDENT = DecoderConfig(1022, 256, 512, 3, 4, 2, 128)
RANK = 128
STATS = EpochStats(100_000, 64, 0.5, Limits(256, 128), "the test")


def config_for(data: int = -1, fsdp: int = 1, tensor: int = 1, rows: int = 8, accumulate: int = 2) -> Any:
    config = default()
    config.adapter.lora.targets, config.adapter.lora.rank = ("q_proj",), RANK  # each target costs the compiler a second
    config.train.row_length = 256
    config.train.batch_rows, config.train.accumulate = rows, accumulate
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = data, fsdp, tensor
    return config
