"""From a configuration to what training and evaluation both need: mesh, student, decoder."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sqa_jax.checkpoints.load import Student, load_student
from sqa_jax.errors import UserError
from sqa_jax.models.api import T5, Module
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.layers.kernels import fused_attention
from sqa_jax.models.layers.linear import REMAT_POLICIES
from sqa_jax.models.t5.config import T5Config
from sqa_jax.parallel.mesh import batch_sharding, make_mesh, row_shards
from sqa_jax.parallel.rules import shardings


class Runtime(NamedTuple):
    """What a configuration's `student` and `mesh` become."""

    mesh: Mesh
    student: Student
    decoder: Module


def build_runtime(config) -> Runtime:
    """Makes the mesh and reads the student into its shards.

    Raises:
      UserError: the mesh does not fit the devices or the student, or the student cannot be loaded.
    """
    use_compilation_cache()
    mesh = make_mesh(config.mesh)
    student = load_student(
        config.student.path,
        revision=config.student.revision,
        dtype=param_dtype(config, mesh),
        shardings_for=lambda tree: shardings(tree, mesh),
        seed=config.seed,
        picture_tokens=config.student.picture_tokens,
    )
    return Runtime(mesh, student, make_decoder(config, student.config, mesh))


def make_decoder(config, student: StudentConfig, mesh: Mesh) -> Module:
    """The student's module as `config` wants it on the mesh's devices, which need not be here.

    Raises:
      UserError: `config.student.dtype`, `remat` or `attention` is not known, or not possible there.
    """
    if config.student.remat not in REMAT_POLICIES:
        raise UserError(f"config.student.remat is {config.student.remat!r}; choose one of {', '.join(REMAT_POLICIES)}")
    dropout = config.adapter.lora.dropout if "lora" in config.adapter.methods else 0.0
    dtype = resolve_dtype(config.student.dtype, mesh)
    rows = batch_sharding(mesh) if mesh.size > 1 else None
    if isinstance(student, T5Config):
        if config.student.attention not in ("auto", "plain"):
            raise UserError(
                f"config.student.attention={config.student.attention} knows no position bias, which T5 needs; use auto"
            )
        return T5(student, dtype, config.student.remat, dropout, row_shards(mesh), rows)
    fused = fused_attention(config.student.attention, student, dtype, mesh)
    return Decoder(student, dtype, config.student.remat, dropout, fused, row_shards(mesh), rows)


def param_dtype(config, mesh: Mesh) -> Any:
    """The base's type in memory: a frozen one only needs the computation's; a fully trained model starts in float32."""
    return jnp.dtype(jnp.float32) if "full" in config.adapter.methods else resolve_dtype(config.student.dtype, mesh)


def resolve_dtype(name: str, mesh: Mesh) -> Any:
    """The computation's type; "auto" is bfloat16 where the hardware multiplies it faster, float32 on CPUs."""
    if name == "auto":
        name = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"config.student.dtype is {name!r}; choose float32, bfloat16 or auto")
    return jnp.dtype(name)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, where JAX_COMPILATION_CACHE_DIR does not already say where."""
    if not jax.config.jax_compilation_cache_dir:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "sqa_jax", "xla")
        jax.config.update("jax_compilation_cache_dir", cache)
