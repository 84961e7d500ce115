"""Sharding rules: one ordered list of (path pattern, PartitionSpec) for base, adapter and optimizer state alike."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sqa_jax.errors import UserError

# (regex on the tree path, PartitionSpec): the first that matches the end of a path decides. Tensor parallelism
# as in Megatron-LM: column-parallel kernels are sharded over `tensor` in their outputs, row-parallel kernels in their
# inputs, so that one all-reduce closes each pair (Shoeybi et al. 2019, arXiv:1909.08053, section 3); `fsdp` shards the
# other dimension. Leading dimensions are the scanned layers, never sharded.
_COLUMN_PARALLEL = r"((q|k|v|gate|up)_proj|q|k|v|wi|wi_0|wi_1)"  # Llama's names, and T5's
_ROW_PARALLEL = r"((o|down)_proj|o|wo)"
_LORA = r"lora/(\w+\.\w+\.)?"  # T5's layer names are prefixed with stack and module
Rules = tuple[tuple[str, P], ...]
RULES: Rules = (
    # Vision encoders, whose names differ; small parameters are replicated.
    (r"vision/(projector|merger/fc1|merger/fc2)/kernel", P("fsdp", "tensor")),
    (r"vision/\S+/(\w+_proj|fc1|qkv)/kernel", P(None, "fsdp", "tensor")),
    (r"vision/\S+/(fc2|proj)/kernel", P(None, "tensor", "fsdp")),
    (r"vision/\S+/(kernel|embedding|scale|bias)", P()),
    (r"lora/vision\.\S+/(a|b)", P()),
    (r"visual/embedding", P()),
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (rf"{_COLUMN_PARALLEL}/kernel", P(None, "fsdp", "tensor")),
    (rf"{_ROW_PARALLEL}/kernel", P(None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/bias", P(None, "tensor")),
    (r"(o|down)_proj/bias", P(None, "fsdp")),
    (r"(\w+_layernorm|[qk]_norm)/scale", P(None, None)),
    (r"norm/scale", P(None)),
    (r"relative_attention_bias/embedding", P(None, None)),
    (rf"{_LORA}{_COLUMN_PARALLEL}/a", P(None, "fsdp", None)),
    (rf"{_LORA}{_COLUMN_PARALLEL}/b", P(None, None, "tensor")),
    (rf"{_LORA}{_ROW_PARALLEL}/a", P(None, "tensor", None)),
    (rf"{_LORA}{_ROW_PARALLEL}/b", P(None, None, "fsdp")),
    (r"prefix/(key|value)", P(None, None, "tensor")),
    (r"prefix/(hidden|output)/kernel", P("fsdp", "tensor")),
    (r"prefix/(hidden|output)/bias", P("tensor")),
    (r"(prefix|prompt)/embedding", P(None, "fsdp")),
    (r"(count|step)", P()),
)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as the rules match it: keys joined by "/"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> P:
    """The PartitionSpec of one leaf.

    Raises:
      UserError: no rule matches, or a mesh axis does not divide its dimension.
    """
    spec = next((spec for pattern, spec in rules if re.search(rf"(^|/){pattern}$", name)), None)
    if spec is None:
        raise UserError(f"parameter {name} {shape}: no sharding rule matches; add one to sqa_jax/parallel/rules.py")
    if len(spec) > len(shape):
        raise UserError(f"parameter {name} {shape}: its sharding rule {spec} has more dimensions than it")
    for dimension, (size, axis) in enumerate(zip(shape, spec, strict=False)):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"parameter {name} {shape}: mesh axis {axis} = {mesh.shape[axis]} does not divide dimension "
                f"{dimension} of size {size}; change config.mesh.{axis}"
            )
    return spec


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The `NamedSharding` of every leaf of a tree of arrays or shapes.

    Raises:
      UserError: as `spec_for`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules)), tree
    )
