"""The table of a decoder-only model's parameters."""

from __future__ import annotations

from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.param_spec import ParamSpec

# Tensors that files may repeat, and that the model does not use: none but those of all families.
COPIES: tuple[str, ...] = ()
UNUSED: tuple[str, ...] = ()


def param_specs(config: DecoderConfig) -> list[ParamSpec]:
    """Every parameter of the language model."""
    D, L = config.hidden_size, config.num_layers

    def layered(path: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        names = tuple(f"model.layers.{i}.{name}" for i in range(L))
        return ParamSpec(("layers", *path), (L, *shape), names, True, transposed)

    table = [
        ParamSpec(("embed_tokens", "embedding"), (config.vocab_size, D), ("model.embed_tokens.weight",), False, False),
        ParamSpec(("norm", "scale"), (D,), ("model.norm.weight",), False, False),
    ]
    for norm in config.norms():
        table.append(layered((norm, "scale"), f"{norm}.weight", (D,)))
    for norm in ("q_norm", "k_norm") if config.qk_norm else ():
        table.append(layered(("self_attn", norm, "scale"), f"self_attn.{norm}.weight", (config.head_dim,)))
    for layer, (module, width_in, width_out) in config.linear_shapes().items():
        table.append(layered((module, layer, "kernel"), f"{module}.{layer}.weight", (width_in, width_out), True))
        if config.bias(layer):
            table.append(layered((module, layer, "bias"), f"{module}.{layer}.bias", (width_out,)))
    if not config.tie_embeddings:
        table.append(ParamSpec(("lm_head", "kernel"), (D, config.vocab_size), ("lm_head.weight",), False, True))
    return table
