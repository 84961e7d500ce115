"""An adapter: a dict of methods beside a frozen base, e.g. {"lora": …, "prefix": …}, or {"full": the model}.

Methods combine, except that full fine-tuning stands alone. The trained tree, its gradient, the optimizer's
state and the checkpoints hold nothing of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.adapters import lora, prefix, prompt, visual
from sqa_jax.errors import UserError
from sqa_jax.models.api import module_for, prefill
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.layers.kv_cache import Adaptation
from sqa_jax.models.params import VISION
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT, SoftPromptTokens
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.vision.adapter import VisionAdapter

_SEEING = f"{VISION}."  # what names of a tower's and a connector's layers begin with
METHODS = ("lora", "prefix", "prompt", "full", "visual")
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


def soft_prompt_tokens(settings) -> SoftPromptTokens:
    """The tokens that a soft prompt adds to every sequence."""
    prompt = settings.prompt
    return SoftPromptTokens(prompt.length, prompt.behind_picture) if "prompt" in settings.methods else NO_SOFT_PROMPT


def prompt_text_tokens(settings, tokenizer: Any) -> list[int]:
    """The ids of `config.adapter.prompt.text` where a soft prompt starts from it, else none."""
    prompt = settings.prompt
    if "prompt" not in settings.methods or prompt.init != "text":
        return []
    return tokenizer(prompt.text, add_special_tokens=False)["input_ids"]


def init_adapter(settings, student: StudentConfig, base: Tree, seed: int, words: Sequence[int] = ()) -> Tree:
    """A new adapter tree in float32. A pure function of its arguments: run it under `jit` to shard it.

    Args:
      words: as `prompt_text_tokens` gives them.

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
        table = base["embed_tokens"]["embedding"]
        tree["prompt"] = prompt.init(settings.prompt, student, table, keys["prompt"], words)
    if "visual" in settings.methods:
        tree["visual"] = visual.init(settings.visual, student, keys["visual"])
    if "full" in settings.methods:
        tree["full"] = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), base)  # a copy: training donates it
    return tree


def _activations(student: StudentConfig, base: Tree, length: int, key: jax.Array) -> Tree:
    """Keys and values [L, P, K·d] that the base computes for P tokens drawn from its vocabulary."""
    tokens = jax.random.randint(key, (1, length), min(512, student.vocab_size // 2), student.vocab_size)
    if isinstance(student, T5Config):  # the encoder reads them, too, and the decoder repeats them
        tokens = jnp.concatenate([tokens, jnp.full((1, 1), student.decoder_start), tokens], axis=1)
    positions, segments = jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
    _, key, value, _ = prefill(module_for(student)(student), base, tokens, positions, segments, Adaptation())
    shape = (student.num_layers, length, student.num_kv_heads * student.head_dim)
    return {"key": key[:, :, -length:].reshape(shape), "value": value[:, :, -length:].reshape(shape)}


def model_params(tree: Tree, base: Tree) -> Tree:
    """The weights that the decoder reads: the base, or the trained model where that is the adapter."""
    return tree.get("full", base)


def adapter_inputs(settings, tree: Tree, student: StudentConfig) -> Adaptation:
    """The adapter in the form that the student uses. Differentiable; an empty tree is the bare student."""
    low = lora.scaled_matrices(settings.lora, tree["lora"]) if "lora" in tree else {}
    reading = {name: layer for name, layer in low.items() if not name.startswith(_SEEING)}
    return Adaptation(
        lora=reading or None,
        prefix=prefix.key_values(settings.prefix, tree["prefix"], student) if "prefix" in tree else None,
        prompt=tree["prompt"]["embedding"] if "prompt" in tree else None,
        tower=_tower(tree, {name.removeprefix(_SEEING): low[name] for name in low.keys() - reading.keys()}),
    )


def _tower(tree: Tree, low: Tree) -> VisionAdapter | None:
    """What is added to tower and connector, whose linear layers are adapted by `low`."""
    if not low and "visual" not in tree:
        return None
    stacked = {name: layer for name, layer in low.items() if layer["a"].ndim == 3}
    return VisionAdapter(
        prompts=tree["visual"]["embedding"] if "visual" in tree else None,
        lora=stacked or None,
        connector={name: low[name] for name in low.keys() - stacked.keys()} or None,
    )


def merge(settings, tree: Tree, base: Tree, student: StudentConfig) -> Tree:
    """One model of base and adapter: LoRA is added into the kernels, a fully trained model is itself.

    Raises:
      UserError: the tree holds a prefix or prompts, which no weight can express.
    """
    if rest := sorted(set(tree) - {"lora", "full"}):
        other = "only sqa_jax has it, evaluate the run itself" if "visual" in rest else "export it as an adapter"
        raise UserError(f"an adapter with {' and '.join(rest)} cannot be merged into weights; {other}")
    base = model_params(tree, base)
    return lora.merge(settings.lora, tree["lora"], base, student) if "lora" in tree else base
