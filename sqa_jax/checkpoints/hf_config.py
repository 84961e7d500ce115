"""Model configurations in Hugging Face's `config.json`, read and written."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import FULL, NOPE, WINDOW, DecoderConfig, checked
from sqa_jax.models.rope_frequencies import ROPES, Rope
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.t5 import config as t5_config
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.vision.registry import FAMILIES, VisionConfig, vision_family

SUPPORTED = ("llama", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")  # values of model_type
_MAX_LAYERS = 10_000
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Keys for which transformers would fill in a default.
_REQUIRED_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def from_hf(raw: dict[str, Any], where: str, processor: dict[str, Any] | None = None) -> StudentConfig:
    """A model's configuration from Hugging Face's `config.json`.

    transformers fills in what the file leaves to its architecture, and translates older files.

    Args:
      where: the file, for messages.
      processor: `preprocessor_config.json` of a vision-language model; None is its family's default.

    Raises:
      UserError: the architecture, rope type, activation or quantization is not supported, a key is missing, or
        the sizes contradict each other.
    """
    family = raw.get("model_type")
    if family == "t5":
        return t5_config.from_hf(raw, where)
    if family in FAMILIES:
        return _vision_language_config(raw, processor or {}, where)
    if family not in SUPPORTED:
        raise UserError(
            f"{where}: architecture {family!r} is not supported; supported: {', '.join((*SUPPORTED, *FAMILIES, 't5'))}"
        )
    _check_sizes(raw, where)
    return checked(_decoder_config(family, _parse(raw, where), where), where)


def _check_sizes(raw: dict[str, Any], where: str) -> None:
    """Raises `UserError` for quantized weights, and for sizes that are missing or not positive."""
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise UserError(
            f"{where}: weights quantized with {method!r} are not supported; use the original weights or a .gguf file"
        )
    if missing := [key for key in _REQUIRED_SIZES if key not in raw]:
        raise UserError(f"{where}: key {missing[0]!r} is missing; fetch the model's config.json again")
    for key in (*_REQUIRED_SIZES, "num_key_value_heads", "head_dim"):
        if raw.get(key) is not None and (not isinstance(raw[key], int) or raw[key] <= 0):
            raise UserError(f"{where}: {key} is {raw[key]!r}, which is not a positive number; fetch the model again")
    if raw["num_hidden_layers"] > _MAX_LAYERS:  # before a list with an entry for each is built
        raise UserError(f"{where}: {raw['num_hidden_layers']} layers are more than any model has; fetch the file again")


def _parse(raw: dict[str, Any], where: str) -> Any:
    """transformers' configuration object. Raises `UserError` where transformers raises."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # whatever its validation raises
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: transformers refuses it ({reason}); fetch the model's config.json again") from None


def _decoder_config(family: str, hf: Any, where: str) -> DecoderConfig:
    """A decoder's configuration from transformers' configuration object."""
    ropes = hf.rope_parameters or {}
    if "full_attention" not in ropes:
        ropes = {"full_attention": ropes}
    local = ropes.get("sliding_attention")
    if getattr(hf, "use_bidirectional_attention", False):
        raise UserError(f"{where}: attention in both directions is not supported; choose another student")
    activation = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if activation not in _ACTIVATIONS:
        raise UserError(f"{where}: activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    gemma, bias = family.startswith("gemma"), bool(getattr(hf, "attention_bias", family == "qwen2"))
    layer_types = _layer_types(hf, where)
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rope=_rope(ropes["full_attention"], where),
        norm_epsilon=hf.rms_norm_eps,
        tie_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=bias,
        output_bias=bias and family != "qwen2",
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        max_positions=hf.max_position_embeddings,
        family=family,
        activation=_ACTIVATIONS[activation],
        qk_norm=family in ("qwen3", "gemma3_text"),
        norm_offset=gemma,
        sandwich_norms=family in ("gemma2", "gemma3_text"),
        embedding_scale=gemma,
        query_scale=getattr(hf, "query_pre_attn_scalar", 0),
        attention_softcap=float(getattr(hf, "attn_logit_softcapping", None) or 0),
        logit_softcap=float(getattr(hf, "final_logit_softcapping", None) or 0),
        window=hf.sliding_window if WINDOW in layer_types else 0,
        layer_types=layer_types,
        local_rope=None if local is None or WINDOW not in layer_types else _rope(local, where),
    )


def _vision_language_config(raw: dict[str, Any], processor: dict[str, Any], where: str) -> DecoderConfig:
    """The language model's configuration with the vision encoder's in it."""
    family = raw["model_type"]
    vision = FAMILIES[family].from_hf(raw, processor, where)
    # Older files of Qwen2-VL have the language model's options beside the others.
    text = dict(raw.get("text_config") or {key: value for key, value in raw.items() if key != "vision_config"})
    kind = text.get("model_type", family)
    text["model_type"] = {"qwen2_vl": "qwen2", "qwen2_vl_text": "qwen2", "paligemma": "gemma"}.get(kind, kind)
    if family == "paligemma":
        text["use_bidirectional_attention"] = False  # of images and prompts, which `prefix_lm` says
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = dict(text.get(key) or {})
    sections = rope.pop("mrope_section", ())
    if family == "qwen2_vl":
        if "mrope" in (rope.get("type"), rope.get("rope_type")):
            rope = {name: value for name, value in rope.items() if name not in ("type", "rope_type")}
        text[key] = rope or None
        if 2 * sum(sections) != text["hidden_size"] // text["num_attention_heads"]:
            raise UserError(
                f"{where}: mrope_section {sections} does not divide up the frequencies of a head; fetch config.json again"
            )
    tied = raw.get("tie_word_embeddings", family == "paligemma")
    config = from_hf({**text, "tie_word_embeddings": tied}, where)
    if not isinstance(config, DecoderConfig):
        raise UserError(
            f"{where}: a language model of type {text['model_type']} is not supported; choose another student"
        )
    return dataclasses.replace(
        config,
        prefix_lm=family == "paligemma",
        first_position=int(family == "paligemma"),
        mrope_sections=tuple(sections) if family == "qwen2_vl" else (),
        vision=vision,
    )


def _layer_types(hf: Any, where: str) -> tuple[str, ...]:
    names = {"full_attention": FULL, "sliding_attention": WINDOW}
    listed = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    if unknown := sorted(set(listed) - set(names)):
        raise UserError(f"{where}: layer type {unknown[0]!r} is not supported; supported: {', '.join(names)}")
    kinds = [names[name] for name in listed]
    for index, has_rope in enumerate(getattr(hf, "no_rope_layers", None) or ()):
        if not has_rope and index < len(kinds):
            if kinds[index] == WINDOW:
                raise UserError(
                    f"{where}: a sliding window without rotary positions is not supported; choose another student"
                )
            kinds[index] = NOPE
    return () if set(kinds) == {FULL} else tuple(kinds)


def _rope(raw: dict[str, Any], where: str) -> Rope:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in ROPES:
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(ROPES)}")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: a rotary embedding of a part of the head is not supported; choose another student")
    try:
        fields: dict[str, Any] = {"theta": float(raw["rope_theta"]), "kind": kind}
        if kind != "default":
            fields["factor"] = float(raw["factor"])
        if kind == "llama3":
            fields |= {
                "low_frequency_factor": float(raw["low_freq_factor"]),
                "high_frequency_factor": float(raw["high_freq_factor"]),
                "original_positions": int(raw["original_max_position_embeddings"]),
            }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: rope parameters {raw} lack something ({error}); fetch the model again") from None
    return Rope(**fields)


def to_hf(config: StudentConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads as the same model."""
    if isinstance(config, T5Config):
        return t5_config.to_hf(config)
    assert isinstance(config, DecoderConfig)
    if config.vision is not None:
        return _vision_language_to_hf(config, config.vision)
    c = config
    classes = {"smollm3": "SmolLM3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
    rope = _rope_to_hf(c.rope)
    if c.family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": _rope_to_hf(c.local_rope or c.rope)}
    activation = {ours: hf_name for hf_name, ours in _ACTIVATIONS.items()}[c.activation]
    return {
        "architectures": [classes.get(c.family, f"{c.family.capitalize()}ForCausalLM")],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rope_parameters": rope,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.max_positions,
        "hidden_activation" if c.family in ("gemma2", "gemma3_text") else "hidden_act": activation,
        # Else transformers takes the family's defaults, which need not be in this vocabulary.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **_family_keys(config),
    }


def _family_keys(c: DecoderConfig) -> dict[str, Any]:
    """The keys of `config.json` that only some families have."""
    names = {FULL: "full_attention", NOPE: "full_attention", WINDOW: "sliding_attention"}
    keys: dict[str, Any] = {}
    if c.family in ("llama", "smollm3", "qwen3", "gemma", "gemma2", "gemma3_text"):
        keys["attention_bias"] = c.qkv_bias
    if c.family in ("llama", "smollm3"):
        keys["mlp_bias"] = c.mlp_bias
    if c.family == "smollm3":
        keys["no_rope_layers"] = [int(kind != NOPE) for kind in c.kinds]
    elif c.family in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        keys["layer_types"] = [names[kind] for kind in c.kinds]
        keys["sliding_window"] = c.window or None
    if c.family in ("qwen2", "qwen3"):
        keys["use_sliding_window"] = WINDOW in c.kinds
    if c.family in ("gemma2", "gemma3_text"):
        keys |= {
            "query_pre_attn_scalar": c.query_scale or c.head_dim,
            "attn_logit_softcapping": c.attention_softcap or None,
            "final_logit_softcapping": c.logit_softcap or None,
        }
    return keys


def _vision_language_to_hf(config: DecoderConfig, vision: VisionConfig) -> dict[str, Any]:
    text = to_hf(dataclasses.replace(config, vision=None))
    del text["architectures"]
    if config.mrope_sections:
        text["model_type"] = "qwen2_vl_text"
        text["rope_parameters"]["mrope_section"] = list(config.mrope_sections)
    return {
        **vision_family(vision).to_hf(vision),
        "text_config": text,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.kind == "llama3":
        raw |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    return raw
