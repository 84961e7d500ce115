"""From a configuration to what training and evaluation both need: mesh, student, model."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sqa_jax.checkpoints.load import Student, load_student
from sqa_jax.errors import UserError
from sqa_jax.models.api import StudentModel, make_model
from sqa_jax.models.layers.linear import REMAT_POLICIES
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.mesh import batch_sharding, make_mesh, row_shards
from sqa_jax.parallel.rules import shardings


class Runtime(NamedTuple):
    """What a configuration's `student` and `mesh` are built into."""

    mesh: Mesh
    student: Student
    decoder: StudentModel


def build_runtime(config) -> Runtime:
    """Builds the mesh and loads the student, its parameters sharded over it.

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
        max_image_tokens=config.student.max_image_tokens,
    )
    return Runtime(mesh, student, make_decoder(config, student.config, mesh))


def make_decoder(config, student: StudentConfig, mesh: Mesh) -> StudentModel:
    """The model as configured, for the mesh's devices, which need not be attached (planning).

    Raises:
      UserError: `config.student.dtype`, `remat` or `attention` is unknown, or not supported there.
    """
    if config.student.remat not in REMAT_POLICIES:
        raise UserError(f"config.student.remat is {config.student.remat!r}; choose one of {', '.join(REMAT_POLICIES)}")
    dropout = config.adapter.lora.dropout if "lora" in config.adapter.methods else 0.0
    dtype = resolve_dtype(config.student.dtype, mesh)
    return make_model(
        student,
        config.student.attention,
        mesh,
        dtype=dtype,
        remat=config.student.remat,
        lora_dropout=dropout,
        data_shards=row_shards(mesh),
        batch_sharding=batch_sharding(mesh) if mesh.size > 1 else None,
    )


def param_dtype(config, mesh: Mesh) -> Any:
    """The base parameters' dtype: the computation's where they are frozen; float32 for full fine-tuning."""
    return jnp.dtype(jnp.float32) if "full" in config.adapter.methods else resolve_dtype(config.student.dtype, mesh)


def resolve_dtype(name: str, mesh: Mesh) -> Any:
    """The computation's dtype; "auto" is bfloat16 on accelerators, float32 on CPUs."""
    if name == "auto":
        name = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"config.student.dtype is {name!r}; choose float32, bfloat16 or auto")
    return jnp.dtype(name)


def use_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR has done so."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "sqa_jax", "xla")
        jax.config.update("jax_compilation_cache_dir", cache)
