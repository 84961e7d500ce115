"""A student from its path: configuration, parameters, tokenizer and a fingerprint of all three."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sqa_jax.checkpoints import tokenizer as tokenizers
from sqa_jax.checkpoints.gguf.config import from_gguf
from sqa_jax.checkpoints.gguf.tokenizer import gguf_tokenizer, turn_end_ids
from sqa_jax.checkpoints.hf_config import from_hf
from sqa_jax.checkpoints.paths import locate
from sqa_jax.checkpoints.renamed_source import RenamedSource
from sqa_jax.checkpoints.safetensors_source import read_hf_config, read_processor, weight_files
from sqa_jax.checkpoints.sources import GGUFSource, SafetensorsSource, WeightSource
from sqa_jax.checkpoints.weights import ShardingsFor, random_params, read_params
from sqa_jax.errors import UserError
from sqa_jax.files import read_json, sha256_file, sha256_json
from sqa_jax.models.catalogue import SHAPES
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.t5.config import T5Config, as_stored
from sqa_jax.models.vision.registry import vision_family


@dataclasses.dataclass(frozen=True)
class Student:
    """A loaded student.

    Attributes:
      name: short name for tables.
      config: shape and options.
      params: the base tree, as `sqa_jax.models.params` lays it out.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      eos_ids: tokens that end a reply; the tokenizer's end token, which targets end with, comes first.
      fingerprint: hash of configuration, weights and tokenizer; where the files lie does not matter.
    """

    name: str
    config: StudentConfig
    params: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    fingerprint: str


def load_student(
    path: str,
    *,
    revision: str = "",
    dtype: Any = jnp.float32,
    shardings_for: ShardingsFor | None = None,
    seed: int = 0,
    picture_tokens: int = 0,
) -> Student:
    """Loads a student.

    Args:
      path: a Hugging Face directory or hub id; a .gguf file; "random:tiny" or another name of `SHAPES`, or
        "random:<directory with config.json>", for random weights (from `seed`) of that shape.
      revision: branch, tag or commit of a hub id.
      dtype: of the parameters.
      shardings_for: where each parameter lies, given the tree of shapes.
      seed: of random weights.
      picture_tokens: as `student_config`.

    Raises:
      UserError: nothing is there, or it is damaged or not supported; one line says what and what to do.
    """
    if path.startswith("random:"):
        config, vocabulary = student_config(path, picture_tokens=picture_tokens), tokenizers.load_tokenizer(path)
        _check_vocabulary(vocabulary, config, path)
        params = random_params(config, seed, dtype, shardings_for)
        return _student(path, config, params, vocabulary, [], {"seed": seed})
    where = locate(path, revision)
    if where.is_dir():
        raw = read_hf_config(where)
        config = from_hf(raw, f"{where}/config.json", read_processor(where))
        source: WeightSource = SafetensorsSource(where)
        if config.vision is not None:
            source = RenamedSource(source, vision_family(config.vision).NAMES)
        config = as_stored(config, raw, source.shapes) if isinstance(config, T5Config) else config
        vocabulary = tokenizers.load_tokenizer(str(where))
        generation = where / "generation_config.json"  # chat models list there every token that ends a turn
        ends = (
            _ends(read_json(generation, "the tokens that end a reply"), "eos_token_id", config, generation)
            if generation.exists()
            else []
        )
        files = [where / name for name in weight_files(where)]
    else:
        source = gguf = GGUFSource(where)
        config = from_gguf(gguf)
        vocabulary = gguf_tokenizer(gguf.metadata, path)
        ends = _ends(gguf.metadata, "tokenizer.ggml.eot_token_id", config, where) + turn_end_ids(vocabulary)
        files = [where]
    _check_vocabulary(vocabulary, config, path)
    config = _with_at_most(config, picture_tokens)
    params = read_params(source, config, dtype, shardings_for)
    return _student(path, config, params, vocabulary, ends, [sha256_file(file) for file in files])


def student_config(path: str, revision: str = "", picture_tokens: int = 0) -> StudentConfig:
    """A student's shape and options alone, for a path as in `load_student`: no weights are fetched or read.

    Args:
      picture_tokens: most features of a picture, for a student that sees; 0 is what its files say.

    Raises:
      UserError: nothing is there, or it is damaged or not supported; or the student does not take so few features.
    """
    if path.startswith("random:"):
        return _with_at_most(_random_config(path.removeprefix("random:")), picture_tokens)
    where = locate(path, revision, weights=False)
    if where.is_dir():
        config = from_hf(read_hf_config(where), f"{where}/config.json", read_processor(where))
        return _with_at_most(config, picture_tokens)
    return from_gguf(GGUFSource(where))


def _with_at_most(config: StudentConfig, picture_tokens: int) -> StudentConfig:
    if not picture_tokens or config.vision is None:
        return config
    vision = vision_family(config.vision).with_at_most(config.vision, picture_tokens)
    return dataclasses.replace(config, vision=vision)


def _student(path: str, config: StudentConfig, params: Any, vocabulary: Any, ends: list[int], identity: Any) -> Student:
    eos_ids = tuple(dict.fromkeys([vocabulary.eos_token_id, *ends]))
    parts = [_chosen(config), identity, tokenizers.fingerprint(vocabulary)]
    return Student(Path(path).name or path, config, params, vocabulary, eos_ids, sha256_json(parts))


def _chosen(config: StudentConfig) -> dict[str, Any]:
    """What of a configuration is not as usual, so that a new option changes no fingerprint."""
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in dataclasses.asdict(config).items() if value != usual[name]}


def _random_config(name: str) -> StudentConfig:
    if name in SHAPES:
        return SHAPES[name]
    if not Path(name).is_dir():
        sizes = ", ".join(SHAPES)
        raise UserError(f"random:{name}: choose one of {sizes}, or a directory that holds a config.json")
    return from_hf(read_hf_config(name), f"{name}/config.json", read_processor(name))


def _check_vocabulary(vocabulary: Any, config: StudentConfig, path: str) -> None:
    word, last = max(vocabulary.get_vocab().items(), key=lambda item: item[1])
    if last >= config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer numbers tokens up to {last} ({word!r}), but the model has {config.vocab_size} embeddings; "
            "use the tokenizer that the model was published with, or give the model rows for the new tokens "
            "(transformers' resize_token_embeddings)"
        )


def _ends(raw: Any, key: str, config: StudentConfig, where: Path) -> list[int]:
    """The tokens under `key`, which holds one, several or none."""
    ends = raw.get(key) if isinstance(raw, dict) else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if bad := [end for end in ends if not isinstance(end, int) or not 0 <= end < config.vocab_size]:
        raise UserError(
            f"{where}: {key} {bad[0]!r} is not one of the model's {config.vocab_size} tokens; fetch the file again"
        )
    return ends
