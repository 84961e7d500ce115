"""Fingerprints survive renamed fields: these were computed when fields had their original names."""

from __future__ import annotations

import pytest

from sqa_jax.data import images
from sqa_jax.files import sha256_json
from sqa_jax.models.catalogue import SHAPES
from sqa_jax.models.identity import non_default_fields, original_fields


def test_models_have_the_fingerprints_that_they_had():
    fields = {name: non_default_fields(config) for name, config in SHAPES.items()}
    assert sha256_json(fields) == "0bf27f188f5de92a90896ef857a9b6e0568178dd8d24d2cf96b883f605432c3f"


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("paligemma-tiny", "ebba720867b9c4ff"),
        ("smolvlm-tiny", "8fafc654862eb784"),
        ("qwen2-vl-tiny", "f1ef7897371fbaad"),
    ],
)
def test_images_have_the_folders_that_they_had(name, fingerprint):
    assert images._fingerprint(SHAPES[name].vision, ["content"])[:16] == fingerprint


def test_original_names_are_used_at_every_depth():
    fields = original_fields(SHAPES["paligemma-tiny"])
    assert fields["prompt_both_ways"] is True and "tower" in fields["vision"]
    assert "prefix_lm" not in fields and "encoder" not in fields["vision"]
