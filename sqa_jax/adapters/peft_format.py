"""Adapters in PEFT's files: what they are called there, and how they are written.

`adapter_config.json` says what an adapter is and `adapter_model.safetensors` holds it:

    LoRA           base_model.model.{module}.lora_A.weight (r, in) = aᵀ and .lora_B.weight (out, r) = bᵀ
    prefix tuning  prompt_embeddings (P, 2·L·K·d): keys, then values, of each layer; keys as after the rotation.
                   What a reparametrising MLP puts out is stored, never the MLP.
    prompt tuning  prompt_embeddings (P, D)

For an encoder–decoder PEFT looks up layer i's prefix as layer 2 i mod L's (see `sqa_jax.adapters.prefix`), and stores
P further rows of a prompt that it never reads.

Modules are called as in transformers 5. PEFT puts a prompt in front of all, a picture included.

As in peft 0.21 (`peft.utils.save_and_load`, `peft.PeftModel.get_prompt`). PEFT holds one method an adapter; LoRA
beside a prefix or a prompt is two adapters, in a folder each.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sqa_jax.adapters.adapter import adapter_inputs
from sqa_jax.adapters.lora import adaptable
from sqa_jax.checkpoints.safetensors_file import write_safetensors
from sqa_jax.errors import UserError
from sqa_jax.files import write_json
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.params import modules
from sqa_jax.models.t5.config import T5Config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = "prompt_embeddings"
Tree = dict[str, Any]


class PeftFiles(NamedTuple):
    """The contents of the two files of one adapter."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def lora_modules(student: StudentConfig, keys: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """What PEFT calls each linear layer that LoRA may adapt: {our name: its module in layer 0, 1, …}.

    Args:
      keys: of a file: what it holds is called as there, which may be as in an older release of transformers.
    """

    def called(weight: str) -> str:
        *older, newest = modules(student, weight.removesuffix(".weight"))
        return next((module for module in older if lora_keys(module)[0] in keys), newest)

    return {name: tuple(map(called, leaf.names)) for name, leaf in adaptable(student).items()}


def stored_prefix(student: StudentConfig) -> np.ndarray:
    """The layer of PEFT's file that holds each layer's prefix, [L]."""
    layers = np.arange(student.num_layers)
    return 2 * layers % student.num_layers if isinstance(student, T5Config) else layers


def lora_keys(module: str) -> tuple[str, str]:
    """The tensors of A and B of an adapted module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def submodules(student: StudentConfig) -> int:
    """PEFT's count of stacks: two of an encoder–decoder."""
    return 2 if isinstance(student, T5Config) else 1


def to_peft(settings, tree: Tree, student: StudentConfig, base: str, revision: str = "") -> dict[str, PeftFiles]:
    """An adapter as PEFT's files, {method: files}.

    Args:
      settings: `config.adapter` of the tree.
      base, revision: where PEFT's users find the student.

    Raises:
      UserError: PEFT has no adapter of this kind.
    """
    if not tree:
        raise UserError(
            "the bare student has no adapter to export; use --format hf, or another --config.eval.checkpoint"
        )
    if "full" in tree:
        raise UserError("full fine-tuning leaves a model, not an adapter; export it with --format hf")
    if "visual" in tree:
        raise UserError(
            "PEFT has no deep visual prompts: evaluate the run itself, or train without the method visual "
            "(config.adapter.lora.tower adapts the tower in a form that PEFT has)"
        )
    if "prompt" in tree and settings.prompt.behind_picture and student.vision is not None:
        raise UserError(
            "PEFT puts a prompt in front of the picture, this one is behind it; train with "
            "--config.adapter.prompt.behind_picture=False"
        )
    if {"prefix", "prompt"} <= set(tree):
        raise UserError(
            "PEFT cannot put a prefix and a prompt in front of one model; train with one of them (lora may be beside it)"
        )
    about = {
        "task_type": "SEQ_2_SEQ_LM" if isinstance(student, T5Config) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "inference_mode": True,
    }
    adapted = adapter_inputs(settings, tree, student)
    writers = {
        "lora": lambda: _lora(settings.lora, tree["lora"], student),
        "prefix": lambda: _prefix(adapted.prefix, student),
        "prompt": lambda: _prompt(adapted.prompt, student),
    }
    made = {method: writers[method]() for method in tree}
    return {method: PeftFiles({**about, **one.config}, one.tensors) for method, one in made.items()}


def write_peft(files: dict[str, PeftFiles], directory: Path) -> None:
    """Writes one method into a directory, or several into folders of it that have their names."""
    for method, one in files.items():
        folder = directory if len(files) == 1 else directory / method
        folder.mkdir(exist_ok=True)
        write_json(folder / CONFIG, one.config)
        write_safetensors(folder / WEIGHTS, one.tensors)


def _lora(settings, tree: Tree, student: StudentConfig) -> PeftFiles:
    known = lora_modules(student)
    tensors = {}
    for name, layer in tree.items():
        a, b = (np.asarray(layer[part]).reshape(-1, *layer[part].shape[-2:]) for part in "ab")
        for index, module in enumerate(known[name]):
            key_a, key_b = lora_keys(module)
            tensors[key_a], tensors[key_b] = np.ascontiguousarray(a[index].T), np.ascontiguousarray(b[index].T)
    config = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _targets(tree, known, student.vision is not None),
        "bias": "none",
    }
    return PeftFiles(config, tensors)


def _targets(adapted, known: dict[str, tuple[str, ...]], sees: bool) -> list[str] | str:
    """The shortest `target_modules` that mean these layers and no others: last parts of names, else an expression.

    A student that sees has modules that are no linear layers and end alike, such as the convolution of its patches.
    """

    def last(names) -> set[str]:
        return {module.rpartition(".")[2] for name in names for module in known[name]}

    if not sees and last(adapted).isdisjoint(last(set(known) - set(adapted))):
        return sorted(last(adapted))
    return "|".join(map(_expression, (known[name] for name in adapted)))


def _expression(layers: tuple[str, ...]) -> str:
    """A regular expression for a module of all layers, whose names differ in the layer's number."""
    parts = zip(*(module.split(".") for module in layers), strict=True)
    return r"\.".join(re.escape(own[0]) if len(set(own)) == 1 else r"\d+" for own in parts)


def _prefix(prefix: dict[str, jax.Array], student: StudentConfig) -> PeftFiles:
    own = np.stack([np.asarray(prefix["key"]), np.asarray(prefix["value"])], axis=1)  # [L, 2, P, K·d]
    length, stacked = own.shape[2], np.zeros_like(own)
    stacked[stored_prefix(student)] = own
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": student.num_layers,
        "num_attention_heads": student.num_kv_heads,
        "token_dim": student.num_kv_heads * student.head_dim,
        "num_transformer_submodules": submodules(student),
        "prefix_projection": False,
    }
    return PeftFiles(config, {EMBEDDINGS: np.ascontiguousarray(stacked.transpose(2, 0, 1, 3)).reshape(length, -1)})


def _prompt(embedding: jax.Array, student: StudentConfig) -> PeftFiles:
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": embedding.shape[0],
        "num_layers": student.num_layers,
        "num_attention_heads": student.num_heads,
        "token_dim": student.hidden_size,
        "num_transformer_submodules": submodules(student),
    }
    unread = np.zeros_like(embedding, shape=((submodules(student) - 1) * len(embedding), embedding.shape[1]))
    return PeftFiles(config, {EMBEDDINGS: np.concatenate([np.asarray(embedding), unread])})
