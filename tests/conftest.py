"""Eight simulated devices, the real student's file, and a tiny student that everything can be tried on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tiny models spend their time in the compiler, which is twice as fast where it optimises nothing.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What one test has compiled no other compiles again, nor its child processes.
_cache = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The pretrained student's GGUF file, which launch/test.sh fetches."""
    path = ROOT / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.exists(), f"{path} is missing: run `bash launch/fetch_student.sh`"
    return str(path)


@pytest.fixture(scope="session")
def tiny_student():
    """Two random layers and a tokenizer of bytes."""
    from sqa_jax.students.load import load_student

    return load_student("random:tiny")
