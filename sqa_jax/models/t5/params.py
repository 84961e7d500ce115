"""The table of a T5's parameters."""

from __future__ import annotations

from sqa_jax.models.param_spec import ParamSpec
from sqa_jax.models.t5.config import T5Config

# Of each stack its modules, in the order in which a block applies them, by our name and the file's.
_MODULES = {
    "encoder": {"self_attn": "SelfAttention", "mlp": "DenseReluDense"},
    "decoder": {"self_attn": "SelfAttention", "cross_attn": "EncDecAttention", "mlp": "DenseReluDense"},
}
# Tensors that files may hold besides: copies of the shared embeddings, and a bias that transformers never applies.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def param_specs(config: T5Config) -> list[ParamSpec]:
    """Every parameter of a T5."""
    D, V = config.hidden_size, config.vocab_size
    depths = {"encoder": config.num_encoder_layers, "decoder": config.num_layers}

    def layered(module: str, path: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool) -> ParamSpec:
        stack, kind = module.split(".")
        index, depth = list(_MODULES[stack]).index(kind), depths[stack]
        names = tuple(f"{stack}.block.{i}.layer.{index}.{name}.weight" for i in range(depth))
        return ParamSpec((stack, "layers", *path), (depth, *shape), names, True, transposed)

    table = [ParamSpec(("embed_tokens", "embedding"), (V, D), ("shared.weight",), False, False)]
    for stack, modules in _MODULES.items():
        table.append(ParamSpec((stack, "norm", "scale"), (D,), (f"{stack}.final_layer_norm.weight",), False, False))
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shape = (config.num_buckets, config.num_heads)
        table.append(ParamSpec((stack, "relative_attention_bias", "embedding"), shape, (bias,), False, False))
        for kind in modules:
            table.append(layered(f"{stack}.{kind}", (f"{kind}_layernorm", "scale"), "layer_norm", (D,), False))
    for layer, (module, width_in, width_out) in config.linear_shapes().items():
        stack, kind, name = layer.split(".")
        path, file_name = (kind, name, "kernel"), f"{_MODULES[stack][kind]}.{name}"
        table.append(layered(module, path, file_name, (width_in, width_out), True))
    if not config.tie_embeddings:
        table.append(ParamSpec(("lm_head", "kernel"), (D, V), ("lm_head.weight",), False, True))
    return table
