"""A student from its path: configuration, parameters, tokenizer and a fingerprint of all three."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sqa_jax.errors import UserError
from sqa_jax.files import sha256_json
from sqa_jax.students import tokenizer as tokenizers
from sqa_jax.students.config import DecoderConfig, from_gguf, from_hf
from sqa_jax.students.sources import GGUFSource, SafetensorsSource, WeightSource, read_hf_config
from sqa_jax.students.weights import ShardingsFor, random_params, read_params

# Shapes for "random:<name>": students that learn nothing of language but run everywhere in seconds.
_RANDOM_SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16),
    "small": dict(hidden_size=128, intermediate_size=384, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=16),
}


@dataclasses.dataclass(frozen=True)
class Student:
    """A loaded student.

    Attributes:
      name: short name for tables.
      config: of the decoder.
      params: the base tree, as `sqa_jax.students.layout` lays it out.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      eos_ids: tokens that end a reply.
      fingerprint: hash of configuration and origin of the weights.
    """

    name: str
    config: DecoderConfig
    params: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    fingerprint: str


def load_student(
    path: str, *, revision: str = "", dtype: Any = jnp.float32, shardings_for: ShardingsFor | None = None, seed: int = 0
) -> Student:
    """Loads a student.

    Args:
      path: a Hugging Face directory or hub id; a .gguf file; "random:tiny", "random:small", or
        "random:<directory with config.json>" for random weights (from `seed`) of that shape.
      dtype: of the parameters.
      shardings_for: where each parameter lies, given the tree of shapes.

    Raises:
      UserError: nothing is there, or it is damaged or not supported; one line says what and what to do.
    """
    if not path:
        raise UserError("config.student.path is empty; give a model directory, a hub id, a .gguf file or random:tiny")
    if path.startswith("random:"):
        config, vocabulary = _random_config(path.removeprefix("random:")), tokenizers.load_tokenizer(path)
        if len(vocabulary) > config.vocab_size:
            raise UserError(f"{path}: its tokenizer has {len(vocabulary)} tokens, more than the configured {config.vocab_size}")
        params = random_params(config, seed, dtype, shardings_for)
        return _student(path, config, params, vocabulary, {"seed": seed})
    if path.endswith(".gguf"):
        source: WeightSource = GGUFSource(path)
        config = from_gguf(source.metadata, path)
        config = dataclasses.replace(
            config,
            tie_embeddings="lm_head.weight" not in source.shapes,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in source.shapes,
        )
        vocabulary = tokenizers.gguf_tokenizer(source.metadata, path)
        identity: Any = {"file": Path(path).name, "bytes": Path(path).stat().st_size}
    else:
        directory = _hub_directory(path, revision)
        config = from_hf(read_hf_config(directory), f"{directory}/config.json")
        source, vocabulary = SafetensorsSource(directory), tokenizers.load_tokenizer(str(directory))
        identity = {f.name: f.stat().st_size for f in sorted(directory.glob("*.safetensors"))}
    if len(vocabulary) > config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {len(vocabulary)} tokens but the weights have {config.vocab_size} embeddings; "
            "use the tokenizer that the model was published with"
        )
    return _student(path, config, read_params(source, config, dtype, shardings_for), vocabulary, identity)


def _student(path: str, config: DecoderConfig, params: Any, vocabulary: Any, identity: Any) -> Student:
    parts = [dataclasses.asdict(config), identity, tokenizers.fingerprint(vocabulary)]
    return Student(Path(path).name, config, params, vocabulary, (vocabulary.eos_token_id,), sha256_json(parts))


def _random_config(name: str) -> DecoderConfig:
    if name in _RANDOM_SHAPES:
        return DecoderConfig(vocab_size=260, tie_embeddings=True, **_RANDOM_SHAPES[name])
    if not Path(name).is_dir():
        raise UserError(f"random:{name}: choose one of {', '.join(_RANDOM_SHAPES)}, or a directory that holds a config.json")
    return from_hf(read_hf_config(name), f"{name}/config.json")


def _hub_directory(path: str, revision: str) -> Path:
    """The local directory itself, or the hub's files in the local cache."""
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{path}: no such model directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model", "merges.txt"]
    try:
        return Path(snapshot_download(path, revision=revision or None, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise UserError(f"{path}: not on the hub (revision {revision or 'main'}); check config.student.path, or log in for a gated model") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{path}: the hub cannot be reached ({type(error).__name__}); download the model and give its directory") from None
