"""Published accuracies on ScienceQA's official test split (4,241 questions), each with its source."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A published accuracy in percent (column AVG)."""

    system: str
    accuracy: float
    source: str


_LU = "Lu et al. 2022, arXiv:2209.09513"

PUBLISHED = (
    Published("Random choice", 39.83, _LU),
    Published("UnifiedQA-base, fine-tuned", 70.12, _LU),
    Published("UnifiedQA-base, fine-tuned with chain of thought", 74.11, _LU),
    Published("GPT-3 (175B), 2-shot chain of thought (QCM→ALE)", 75.17, _LU),
    Published("Multimodal-CoT base", 84.91, "Zhang et al. 2023, arXiv:2302.00923"),
    Published("Chameleon (GPT-4 with tools)", 86.54, "Lu et al. 2023, arXiv:2304.09842"),
    Published("Human", 88.40, _LU),
    Published("LLaVA", 90.92, "Liu et al. 2023, arXiv:2304.08485"),
    Published("Multimodal-T-SciQ large", 96.18, "Wang et al. 2023, arXiv:2305.03453"),
)
