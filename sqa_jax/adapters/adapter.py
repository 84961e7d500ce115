"""An adapter: a dict of methods beside a frozen base, e.g. {"lora": …, "prefix": …}, or {"full": the model}.

Methods combine, except that full fine-tuning stands alone. The trained tree, its gradient, the optimizer state and the
checkpoints contain no weight of the base.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sqa_jax.adapters import lora, prefix, prompt, visual
from sqa_jax.errors import UserError
from sqa_jax.models.adaptation import Adaptation
from sqa_jax.models.api import model_class
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.params import VISION
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT, SoftPromptTokens
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.vision.adapter import VisionAdapter

METHODS = ("lora", "prefix", "prompt", "full", "visual")
_VISION_PREFIX = f"{VISION}."  # of the names of the vision encoder's and the connector's layers


def check_methods(methods: Collection[str]) -> None:
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


def soft_prompt_tokens(settings: Any) -> SoftPromptTokens:
    """The soft prompt tokens that `config.adapter` adds to every sequence."""
    prompt = settings.prompt
    return SoftPromptTokens(prompt.length, prompt.after_image) if "prompt" in settings.methods else NO_SOFT_PROMPT


def prompt_text_tokens(settings: Any, tokenizer: Any) -> list[int]:
    """Token ids of `config.adapter.prompt.text` where a soft prompt is initialised from it, else none."""
    prompt = settings.prompt
    if "prompt" not in settings.methods or prompt.init != "text":
        return []
    return tokenizer(prompt.text, add_special_tokens=False)["input_ids"]


def init_adapter(
    settings: Any, student: StudentConfig, base: ParamTree, seed: int, text_tokens: Sequence[int] = ()
) -> ParamTree:
    """A new adapter tree in float32. A pure function of its arguments: run it under `jit` to shard it.

    Args:
      settings: `config.adapter`.
      base: parameters of the student, which prefixes and prompts are initialised from.
      text_tokens: as `prompt_text_tokens` returns them.

    Raises:
      UserError: `config.adapter` is not usable with this student.
    """
    check_methods(settings.methods)
    keys = dict(zip(METHODS, jax.random.split(jax.random.key(seed), len(METHODS)), strict=True))
    tree: ParamTree = {}
    if "lora" in settings.methods:
        tree["lora"] = lora.init(settings.lora, student, keys["lora"])
    if "prefix" in settings.methods:
        activations = _activations(student, base, settings.prefix.length, keys["prefix"])
        tree["prefix"] = prefix.init(settings.prefix, student, keys["prefix"], activations)
    if "prompt" in settings.methods:
        table = base["embed_tokens"]["embedding"]
        tree["prompt"] = prompt.init(settings.prompt, student, table, keys["prompt"], text_tokens)
    if "visual" in settings.methods:
        tree["visual"] = visual.init(settings.visual, student, keys["visual"])
    if "full" in settings.methods:
        tree["full"] = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), base)  # a copy: training donates it
    return tree


def _activations(
    student: StudentConfig, base: ParamTree, length: int, key: jax.Array
) -> dict[str, Float[Array, "L P K·d"]]:
    """Keys and values that the base computes for P tokens drawn from its vocabulary."""
    tokens = jax.random.randint(key, (1, length), min(512, student.vocab_size // 2), student.vocab_size)
    if student.decoder_start is not None:  # the tokens are the encoder's input, too, and the decoder repeats them
        tokens = jnp.concatenate([tokens, jnp.full((1, 1), student.decoder_start), tokens], axis=1)
    positions, segments = jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
    _, keys, values, _ = model_class(student)(student).prefill(base, tokens, positions, segments, Adaptation())
    shape = (student.num_layers, length, student.num_kv_heads * student.head_dim)
    return {"key": keys[:, :, -length:].reshape(shape), "value": values[:, :, -length:].reshape(shape)}


def model_params(tree: ParamTree, base: ParamTree) -> ParamTree:
    """The weights of the forward pass: the base, or the trained model where that is the adapter."""
    return tree.get("full", base)


def adapter_inputs(settings: Any, tree: ParamTree, student: StudentConfig) -> Adaptation:
    """The adapter as inputs of the forward pass. Differentiable; an empty tree is the bare student."""
    matrices = lora.scaled_matrices(settings.lora, tree["lora"]) if "lora" in tree else {}
    text = {name: layer for name, layer in matrices.items() if not name.startswith(_VISION_PREFIX)}
    vision = {name.removeprefix(_VISION_PREFIX): matrices[name] for name in matrices.keys() - text.keys()}
    return Adaptation(
        lora=text or None,
        prefix=prefix.key_values(settings.prefix, tree["prefix"], student) if "prefix" in tree else None,
        prompt=tree["prompt"]["embedding"] if "prompt" in tree else None,
        vision=_vision_adapter(tree, vision),
    )


def _vision_adapter(tree: ParamTree, matrices: ParamTree) -> VisionAdapter | None:
    """Visual prompts, and LoRA of the vision encoder's layers (stacked) and the connector's (not stacked)."""
    if not matrices and "visual" not in tree:
        return None
    stacked = {name: layer for name, layer in matrices.items() if layer["a"].ndim == 3}
    return VisionAdapter(
        prompts=tree["visual"]["embedding"] if "visual" in tree else None,
        lora=stacked or None,
        connector={name: matrices[name] for name in matrices.keys() - stacked.keys()} or None,
    )


def merge(settings: Any, tree: ParamTree, base: ParamTree, student: StudentConfig) -> ParamTree:
    """One model of base and adapter: LoRA is added into the kernels; full fine-tuning's tree already is the model.

    Raises:
      UserError: the tree contains a prefix or prompts, which no weight can express.
    """
    if rest := sorted(set(tree) - {"lora", "full"}):
        other = "only sqa_jax has it, evaluate the run itself" if "visual" in rest else "export it as an adapter"
        raise UserError(f"an adapter with {' and '.join(rest)} cannot be merged into weights; {other}")
    base = model_params(tree, base)
    return lora.merge(settings.lora, tree["lora"], base, student) if "lora" in tree else base
