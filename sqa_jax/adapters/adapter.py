"""An adapter: a dict of methods beside a frozen base, e.g. {"lora": …, "prefix": …}, or {"full": the model}.

Methods combine, except that full fine-tuning stands alone. The trained tree, its gradient, the optimizer's
state and the checkpoints hold nothing of the base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.adapters import lora, prefix, prompt
from sqa_jax.errors import UserError
from sqa_jax.students.cache import Adaptation
from sqa_jax.students.config import StudentConfig
from sqa_jax.students.modules import module_for, read
from sqa_jax.students.t5_config import T5Config

METHODS = ("lora", "prefix", "prompt", "full")
Tree = dict[str, Any]


def check_methods(methods) -> None:
    """Raises `UserError` unless `config.adapter.methods` is one or more known methods that go together."""
    unknown = sorted(set(methods) - set(METHODS))
    if unknown or not methods or len(set(methods)) != len(methods):
        raise UserError(
            f"config.adapter.methods is {tuple(methods)}; name one or more of {', '.join(METHODS)}, each once"
        )
    if "full" in methods and len(methods) > 1:
        raise UserError(
            "config.adapter.methods: full fine-tuning trains every weight and takes no other method beside it"
        )


def virtual_tokens(settings) -> int:
    """Places that a soft prompt takes in front of every sequence."""
    return settings.prompt.length if "prompt" in settings.methods else 0


def init_adapter(settings, student: StudentConfig, base: Tree, seed: int) -> Tree:
    """A new adapter tree in float32. A pure function of its arguments: run it under `jit` to shard it.

    Raises:
      UserError: `config.adapter` is not usable with this student.
    """
    check_methods(settings.methods)
    keys = dict(zip(METHODS, jax.random.split(jax.random.key(seed), len(METHODS)), strict=True))
    tree: Tree = {}
    if "lora" in settings.methods:
        tree["lora"] = lora.init(settings.lora, student, keys["lora"])
    if "prefix" in settings.methods:
        activations = _activations(student, base, settings.prefix.length, keys["prefix"])
        tree["prefix"] = prefix.init(settings.prefix, student, keys["prefix"], activations)
    if "prompt" in settings.methods:
        tree["prompt"] = prompt.init(settings.prompt, base["embed_tokens"]["embedding"], keys["prompt"])
    if "full" in settings.methods:
        tree["full"] = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), base)  # a copy: training donates it
    return tree


def _activations(student: StudentConfig, base: Tree, length: int, key: jax.Array) -> Tree:
    """Keys and values [L, P, K·d] that the base computes for P tokens drawn from its vocabulary."""
    tokens = jax.random.randint(key, (1, length), min(512, student.vocab_size // 2), student.vocab_size)
    if isinstance(student, T5Config):  # the encoder reads them, too, and the decoder repeats them
        tokens = jnp.concatenate([tokens, jnp.full((1, 1), student.decoder_start), tokens], axis=1)
    positions, segments = jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
    _, key, value, _ = read(module_for(student)(student), base, tokens, positions, segments, Adaptation())
    shape = (student.num_layers, length, student.num_kv_heads * student.head_dim)
    return {"key": key[:, :, -length:].reshape(shape), "value": value[:, :, -length:].reshape(shape)}


def weights(tree: Tree, base: Tree) -> Tree:
    """The weights that the decoder reads: the base, or the trained model where that is the adapter."""
    return tree.get("full", base)


def activate(settings, tree: Tree, student: StudentConfig) -> Adaptation:
    """The adapter in the form that the decoder uses. Differentiable; an empty tree is the bare student."""
    return Adaptation(
        lora=lora.activate(settings.lora, tree["lora"]) if "lora" in tree else None,
        prefix=prefix.activate(settings.prefix, tree["prefix"], student) if "prefix" in tree else None,
        prompt=tree["prompt"]["embedding"] if "prompt" in tree else None,
    )


def merge(settings, tree: Tree, base: Tree, student: StudentConfig) -> Tree:
    """One model of base and adapter: LoRA is added into the kernels, a fully trained model is itself.

    Raises:
      UserError: the tree holds a prefix or a prompt, which no weight can express.
    """
    rest = sorted(set(tree) - {"lora", "full"})
    if rest:
        raise UserError(f"an adapter with {' and '.join(rest)} cannot be merged into weights; export it as an adapter")
    base = weights(tree, base)
    return lora.merge(settings.lora, tree["lora"], base, student) if "lora" in tree else base
