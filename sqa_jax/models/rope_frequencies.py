"""Frequencies of rotary position embeddings (RoPE) and their context extensions; needs no JAX."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

ROPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of rotary position embeddings (Su et al. 2021, arXiv:2104.09864).

    Attributes:
      theta: base of the frequencies.
      kind: "default"; "linear", position interpolation by 1/`factor` (Chen et al. 2023, arXiv:2306.15595); "llama3",
        which interpolates low frequencies only (Grattafiori et al. 2024, arXiv:2407.21783, as Llama 3.1 computes it).
      factor: of "linear" and "llama3".
      low_frequency_factor, high_frequency_factor: llama3: waves longer than `original_positions` divided by the first
        are interpolated, those shorter than by the second are not, those between in part.
      original_positions: llama3: longest sequence before the extension.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Radians per position of each pair of a head, [head_dim / 2] float32."""
        frequencies = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        return (frequencies / self.divisors(head_dim)).astype(np.float32)

    def divisors(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Divisors of the default frequencies, [head_dim / 2]."""
        if self.kind == "default":
            return np.ones(head_dim // 2)
        if self.kind == "linear":
            return np.full(head_dim // 2, float(self.factor))
        wavelengths = 2 * np.pi * self.theta ** (np.arange(0, head_dim, 2) / head_dim)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((self.original_positions / wavelengths - low) / (high - low), 0, 1)
        return 1 / (kept + (1 - kept) / self.factor)
