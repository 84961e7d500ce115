"""Adapters in the file format of Hugging Face's PEFT: tensor names, and writing.

`adapter_config.json` describes an adapter and `adapter_model.safetensors` has its tensors:

    LoRA           base_model.model.{module}.lora_A.weight (r, in) = aᵀ and .lora_B.weight (out, r) = bᵀ
    prefix tuning  prompt_embeddings (P, 2·L·K·d): keys, then values, of each layer; keys as after the rotation.
                   The output of a reparametrising MLP is stored, never the MLP.
    prompt tuning  prompt_embeddings (P, D)

For an encoder–decoder PEFT looks up layer i's prefix as layer 2 i mod L's (see `sqa_jax.adapters.prefix`), and stores
P further rows of a prompt that it never uses.

Modules are named as in transformers 5. PEFT prepends a soft prompt to everything, an image included.

As in peft 0.21 (`peft.utils.save_and_load`, `peft.PeftModel.get_prompt`). An adapter of PEFT has one method;
LoRA beside a prefix or a prompt is two adapters, in a folder each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from sqa_jax.adapters.adapter import adapter_inputs
from sqa_jax.adapters.lora import adaptable
from sqa_jax.checkpoints.safetensors_file import write_safetensors
from sqa_jax.errors import UserError
from sqa_jax.files import write_json
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.params import module_names
from sqa_jax.models.student_config import StudentConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = "prompt_embeddings"


class PeftFiles(NamedTuple):
    """The contents of the two files of one adapter."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def lora_modules(student: StudentConfig, keys: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """PEFT's module names of each linear layer that LoRA may adapt: {our name: its module in layer 0, 1, …}.

    Args:
      keys: tensor names of a file. Modules that it has are named as there, which may be as in an older release of
        transformers.
    """

    def module_of(weight: str) -> str:
        *older, newest = module_names(student, weight.removesuffix(".weight"))
        return next((module for module in older if lora_keys(module)[0] in keys), newest)

    return {name: tuple(map(module_of, spec.names)) for name, spec in adaptable(student).items()}


def prefix_layers_in_file(student: StudentConfig) -> Int[np.ndarray, " L"]:
    """The layer of PEFT's file where each layer's prefix is."""
    layers = np.arange(student.num_layers)
    return 2 * layers % student.num_layers if student.is_encoder_decoder else layers


def lora_keys(module: str) -> tuple[str, str]:
    """The tensor names of A and B of an adapted module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def num_submodules(student: StudentConfig) -> int:
    """PEFT's `num_transformer_submodules`: two for an encoder–decoder."""
    return 2 if student.is_encoder_decoder else 1


def to_peft(
    settings: Any, tree: ParamTree, student: StudentConfig, base: str, revision: str = ""
) -> dict[str, PeftFiles]:
    """An adapter as PEFT's files, {method: files}.

    Args:
      settings: `config.adapter` of the tree.
      base, revision: where users of PEFT find the student.

    Raises:
      UserError: PEFT has no adapter of this kind.
    """
    _check_expressible(settings, tree, student)
    common = {
        "task_type": "SEQ_2_SEQ_LM" if student.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "inference_mode": True,
    }
    inputs = adapter_inputs(settings, tree, student)
    writers: dict[str, Callable[[], PeftFiles]] = {
        "lora": lambda: _lora(settings.lora, tree["lora"], student),
        "prefix": lambda: _prefix(inputs.prefix or {}, student),
        "prompt": lambda: _prompt(tree["prompt"]["embedding"], student),
    }
    files = {method: writers[method]() for method in tree}
    return {method: PeftFiles({**common, **config}, tensors) for method, (config, tensors) in files.items()}


def _check_expressible(settings: Any, tree: ParamTree, student: StudentConfig) -> None:
    """Raises `UserError` where PEFT has no adapter of this kind."""
    if not tree:
        raise UserError(
            "the bare student has no adapter to export; use --format hf, or another --config.eval.checkpoint"
        )
    if "full" in tree:
        raise UserError("full fine-tuning leaves a model, not an adapter; export it with --format hf")
    if "visual" in tree:
        raise UserError(
            "PEFT has no deep visual prompts: evaluate the run itself, or train without the method visual "
            "(config.adapter.lora.vision_encoder adapts the vision encoder in a form that PEFT has)"
        )
    if "prompt" in tree and settings.prompt.after_image and student.vision is not None:
        raise UserError(
            "PEFT prepends a prompt to the image, this one is after it; train with "
            "--config.adapter.prompt.after_image=False"
        )
    if {"prefix", "prompt"} <= set(tree):
        raise UserError(
            "PEFT cannot give one model both a prefix and a prompt; train with one of them (lora may be beside it)"
        )


def write_peft(files: dict[str, PeftFiles], directory: Path) -> None:
    """Writes one method into a directory, or each of several into a folder named after it."""
    for method, (config, tensors) in files.items():
        folder = directory if len(files) == 1 else directory / method
        folder.mkdir(exist_ok=True)
        write_json(folder / CONFIG, config)
        write_safetensors(folder / WEIGHTS, tensors)


def _lora(settings: Any, tree: ParamTree, student: StudentConfig) -> PeftFiles:
    modules_of = lora_modules(student)
    tensors = {}
    for name, layer in tree.items():
        a, b = (np.asarray(layer[part]).reshape(-1, *layer[part].shape[-2:]) for part in "ab")
        for index, module in enumerate(modules_of[name]):
            key_a, key_b = lora_keys(module)
            tensors[key_a], tensors[key_b] = np.ascontiguousarray(a[index].T), np.ascontiguousarray(b[index].T)
    config = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _targets(tree, modules_of, student.vision is not None),
        "bias": "none",
    }
    return PeftFiles(config, tensors)


def _targets(adapted: Iterable[str], modules_of: dict[str, tuple[str, ...]], has_vision: bool) -> list[str] | str:
    """The shortest `target_modules` that match these layers and no others: last parts of names, else a regex.

    A vision-language model has modules that are no linear layers but end alike, such as the convolution of its patches.
    """

    def last(names: Iterable[str]) -> set[str]:
        return {module.rpartition(".")[2] for name in names for module in modules_of[name]}

    if not has_vision and last(adapted).isdisjoint(last(set(modules_of) - set(adapted))):
        return sorted(last(adapted))
    return "|".join(map(_module_regex, (modules_of[name] for name in adapted)))


def _module_regex(layers: tuple[str, ...]) -> str:
    """A regular expression for a module of all layers, whose names differ in the layer's index."""
    parts = zip(*(module.split(".") for module in layers), strict=True)
    return r"\.".join(re.escape(part[0]) if len(set(part)) == 1 else r"\d+" for part in parts)


def _prefix(prefix: dict[str, Float[jax.Array, "L P K·d"]], student: StudentConfig) -> PeftFiles:
    key_values = np.stack([np.asarray(prefix["key"]), np.asarray(prefix["value"])], axis=1)  # [L, 2, P, K·d]
    length, stacked = key_values.shape[2], np.zeros_like(key_values)
    stacked[prefix_layers_in_file(student)] = key_values
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": student.num_layers,
        "num_attention_heads": student.num_kv_heads,
        "token_dim": student.num_kv_heads * student.head_dim,
        "num_transformer_submodules": num_submodules(student),
        "prefix_projection": False,
    }
    return PeftFiles(config, {EMBEDDINGS: np.ascontiguousarray(stacked.transpose(2, 0, 1, 3)).reshape(length, -1)})


def _prompt(embedding: Float[jax.Array | np.ndarray, "P D"], student: StudentConfig) -> PeftFiles:
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": embedding.shape[0],
        "num_layers": student.num_layers,
        "num_attention_heads": student.num_heads,
        "token_dim": student.hidden_size,
        "num_transformer_submodules": num_submodules(student),
    }
    unused = np.zeros_like(embedding, shape=((num_submodules(student) - 1) * len(embedding), embedding.shape[1]))
    return PeftFiles(config, {EMBEDDINGS: np.concatenate([np.asarray(embedding), unused])})
