"""Time and memory of loading a student, in its own process: python -m tests.benchmarks.loading PATH [DTYPE].

python -m tests.benchmarks.loading make NAME PATH writes a checkpoint of a published shape with arbitrary weights, in bfloat16.

Prints JSON: size (of the parameters, bytes), peak (memory of this process beyond that before loading, in sizes), and
seconds of CPU time and of wall-clock time. The parameters are sharded over all devices (`fsdp`); on a CPU,
XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of it. Only Linux reports the peak.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer, load_tokenizer
from sqa_jax.checkpoints.weights import param_shapes, write_model
from sqa_jax.models.catalogue import CATALOGUE
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.parallel.rules import shardings


def peak() -> int:
    """Peak memory in bytes; not getrusage's, which starts from the peak of the parent process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def make(name: str, path: str) -> None:
    config, where = CATALOGUE[name].config, Path(path)
    values = np.random.default_rng(0).normal(0, 0.02, 999_983).astype(jnp.bfloat16)
    params = jax.tree.map(lambda leaf: np.resize(values, leaf.shape), param_shapes(config, jnp.bfloat16))
    where.mkdir(parents=True)
    write_model(params, config, where, "bfloat16", "1GB")
    byte_tokenizer().save_pretrained(where)


def main(path: str, dtype: str = "bfloat16") -> None:
    load_tokenizer(path)  # imports all that loading needs
    mesh = make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}))
    before, cores, clock = peak(), time.process_time(), time.perf_counter()
    params = load_student(path, dtype=jnp.dtype(dtype), shardings_for=lambda tree: shardings(tree, mesh)).params
    jax.block_until_ready(params)
    cores, clock = time.process_time() - cores, time.perf_counter() - clock
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"size": size, "peak": (peak() - before) / size, "cores": cores, "clock": clock}))


if __name__ == "__main__":
    make(*sys.argv[2:]) if sys.argv[1:2] == ["make"] else main(*sys.argv[1:])
