"""A student from its path: configuration, parameters, tokenizer and a fingerprint of all three."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sqa_jax.errors import UserError
from sqa_jax.files import read_json, sha256_json
from sqa_jax.students import tokenizer as tokenizers
from sqa_jax.students.config import DecoderConfig, from_gguf, from_hf
from sqa_jax.students.paths import locate
from sqa_jax.students.safetensors_source import read_hf_config, weight_files
from sqa_jax.students.sources import GGUFSource, SafetensorsSource, WeightSource
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
      eos_ids: tokens that end a reply; the tokenizer's end token, which targets end with, comes first.
      fingerprint: hash of configuration, weights and tokenizer; where the files lie does not matter.
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
      revision: branch, tag or commit of a hub id.
      dtype: of the parameters.
      shardings_for: where each parameter lies, given the tree of shapes.
      seed: of random weights.

    Raises:
      UserError: nothing is there, or it is damaged or not supported; one line says what and what to do.
    """
    if path.startswith("random:"):
        config, vocabulary = _random_config(path.removeprefix("random:")), tokenizers.load_tokenizer(path)
        _check_vocabulary(vocabulary, config, path)
        params = random_params(config, seed, dtype, shardings_for)
        return _student(path, config, params, vocabulary, [], {"seed": seed})
    where = locate(path, revision)
    if where.is_dir():
        config = from_hf(read_hf_config(where), f"{where}/config.json")
        source: WeightSource = SafetensorsSource(where)
        vocabulary, ends = tokenizers.load_tokenizer(str(where)), _generation_ends(where, config)
        files = [where / name for name in weight_files(where)]
    else:
        source = gguf = GGUFSource(where)
        config = from_gguf(gguf.metadata, gguf.shapes, path)
        vocabulary = tokenizers.gguf_tokenizer(gguf.metadata, path)
        ends = gguf.metadata.get("tokenizer.ggml.eot_token_id")
        files = [where]
    _check_vocabulary(vocabulary, config, path)
    params = read_params(source, config, dtype, shardings_for)
    return _student(path, config, params, vocabulary, ends, [_digest(file) for file in files])


def _student(path: str, config: DecoderConfig, params: Any, vocabulary: Any, ends: Any, identity: Any) -> Student:
    more = ends if isinstance(ends, list) else [ends]
    eos_ids = tuple(dict.fromkeys([vocabulary.eos_token_id, *(end for end in more if end is not None)]))
    parts = [dataclasses.asdict(config), identity, tokenizers.fingerprint(vocabulary)]
    return Student(Path(path).name or path, config, params, vocabulary, eos_ids, sha256_json(parts))


def _random_config(name: str) -> DecoderConfig:
    if name in _RANDOM_SHAPES:
        return DecoderConfig(vocab_size=260, tie_embeddings=True, **_RANDOM_SHAPES[name])
    if not Path(name).is_dir():
        sizes = ", ".join(_RANDOM_SHAPES)
        raise UserError(f"random:{name}: choose one of {sizes}, or a directory that holds a config.json")
    return from_hf(read_hf_config(name), f"{name}/config.json")


def _check_vocabulary(vocabulary: Any, config: DecoderConfig, path: str) -> None:
    if len(vocabulary) > config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {len(vocabulary)} tokens but the model has {config.vocab_size} embeddings; "
            "use the tokenizer that the model was published with"
        )


def _generation_ends(directory: Path, config: DecoderConfig) -> list[int]:
    """Chat models list in generation_config.json every token that ends a turn."""
    file = directory / "generation_config.json"
    if not file.exists():
        return []
    raw = read_json(file, "the tokens that end a reply")
    ends = raw.get("eos_token_id") if isinstance(raw, dict) else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if bad := [end for end in ends if not isinstance(end, int) or not 0 <= end < config.vocab_size]:
        raise UserError(f"{file}: eos_token_id {bad[0]!r} is not one of the model's {config.vocab_size} tokens; fetch the file again")
    return ends


def _digest(file: Path, step: int = 1 << 18, piece: int = 4096) -> str:
    """Tells files of weights apart without reading all: length, and 4 KiB in every 256 KiB.

    Training moves practically every element of a matrix, so what a fine-tuned sibling of the same size changed shows.
    """
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    with open(file, "rb") as data:
        for start in range(0, file.stat().st_size, step):
            data.seek(start)
            digest.update(data.read(piece))
    return digest.hexdigest()
