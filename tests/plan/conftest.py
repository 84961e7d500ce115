"""Programs of the TPU compiler, and the small students that are planned."""

from __future__ import annotations

import pytest

from tests.support.tpu_programs import TpuPrograms


@pytest.fixture(scope="module")
def tpu_programs(reference, request) -> TpuPrograms:
    """Programs compiled for TPUs, see `tests.support.tpu_programs`."""
    if reference.live:
        request.getfixturevalue("tpu_compiler")
    return TpuPrograms(reference)
