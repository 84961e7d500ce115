"""Loading a student from its path: configuration, parameters, tokenizer, and a fingerprint of all three."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

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
from sqa_jax.models.identity import non_default_fields
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.vision.registry import vision_family


@dataclasses.dataclass(frozen=True)
class Student:
    """A loaded student.

    Attributes:
      name: short name for tables.
      config: shape and options.
      params: the tree of parameters that `sqa_jax.models.params` describes.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      eos_ids: end-of-sequence tokens of a reply; the tokenizer's, which training targets end with, comes first.
      fingerprint: hash of configuration, weights and tokenizer; independent of where the files are.
    """

    name: str
    config: StudentConfig
    params: ParamTree
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
    max_image_tokens: int = 0,
) -> Student:
    """Loads a student.

    Args:
      path: a Hugging Face directory or hub id; a .gguf file; "random:tiny" or another name of `SHAPES`, or
        "random:<directory with config.json>", for random weights (from `seed`) of that shape.
      revision: branch, tag or commit of a hub id.
      dtype: of the parameters.
      shardings_for: gives the sharding of each parameter, from the tree of shapes; None is the default device.
      seed: of random weights.
      max_image_tokens: as `student_config`.

    Raises:
      UserError: nothing is there, or it is damaged or not supported; one line says what is wrong and what to do.
    """
    if path.startswith("random:"):
        config, tokenizer = student_config(path, max_image_tokens=max_image_tokens), tokenizers.load_tokenizer(path)
        _check_vocabulary(tokenizer, config, path)
        params = random_params(config, seed, dtype, shardings_for)
        return _student(path, config, params, tokenizer, [], {"seed": seed})
    where = locate(path, revision)
    checkpoint = _open_directory(where) if where.is_dir() else _open_gguf(where, path)
    _check_vocabulary(checkpoint.tokenizer, checkpoint.config, path)
    config = _with_max_image_tokens(checkpoint.config, max_image_tokens)
    params = read_params(checkpoint.source, config, dtype, shardings_for)
    hashes = [sha256_file(file) for file in checkpoint.files]
    return _student(path, config, params, checkpoint.tokenizer, checkpoint.eos_ids, hashes)


class _Checkpoint(NamedTuple):
    """A checkpoint whose weights are not read yet; `files` contain them, `eos_ids` are further end tokens."""

    config: StudentConfig
    source: WeightSource
    tokenizer: Any
    eos_ids: list[int]
    files: list[Path]


def _open_directory(where: Path) -> _Checkpoint:
    """A Hugging Face directory."""
    raw = read_hf_config(where)
    config = from_hf(raw, f"{where}/config.json", read_processor(where))
    source: WeightSource = SafetensorsSource(where)
    if config.vision is not None:
        source = RenamedSource(source, vision_family(config.vision).TENSOR_NAMES)
    config = config.as_stored(raw, source.shapes)
    tokenizer = tokenizers.load_tokenizer(str(where))
    generation, eos_ids = where / "generation_config.json", []  # chat models list there every token that ends a turn
    if generation.exists():
        eos_ids = _eos_ids(read_json(generation, "the tokens that end a reply"), "eos_token_id", config, generation)
    return _Checkpoint(config, source, tokenizer, eos_ids, [where / name for name in weight_files(where)])


def _open_gguf(where: Path, path: str) -> _Checkpoint:
    """A GGUF file."""
    source = GGUFSource(where)
    config, tokenizer = from_gguf(source), gguf_tokenizer(source.metadata, path)
    eos_ids = _eos_ids(source.metadata, "tokenizer.ggml.eot_token_id", config, where) + turn_end_ids(tokenizer)
    return _Checkpoint(config, source, tokenizer, eos_ids, [where])


def student_config(path: str, revision: str = "", max_image_tokens: int = 0) -> StudentConfig:
    """A student's configuration alone, for a path as in `load_student`: no weights are fetched or read.

    Args:
      max_image_tokens: largest number of image tokens of an image, for a vision-language model; 0 is what its files say.

    Raises:
      UserError: nothing is there, or it is damaged or not supported; or the model cannot use so few image tokens.
    """
    if path.startswith("random:"):
        return _with_max_image_tokens(_random_config(path.removeprefix("random:")), max_image_tokens)
    where = locate(path, revision, weights=False)
    if where.is_dir():
        config = from_hf(read_hf_config(where), f"{where}/config.json", read_processor(where))
        return _with_max_image_tokens(config, max_image_tokens)
    return from_gguf(GGUFSource(where))


def _with_max_image_tokens(config: StudentConfig, max_image_tokens: int) -> StudentConfig:
    if not max_image_tokens or config.vision is None:
        return config
    vision = vision_family(config.vision).with_max_image_tokens(config.vision, max_image_tokens)
    return dataclasses.replace(config, vision=vision)


def _student(
    path: str, config: StudentConfig, params: ParamTree, tokenizer: Any, eos_ids: list[int], identity: Any
) -> Student:
    parts = [non_default_fields(config), identity, tokenizers.fingerprint(tokenizer)]
    eos = tuple(dict.fromkeys([tokenizer.eos_token_id, *eos_ids]))
    return Student(Path(path).name or path, config, params, tokenizer, eos, sha256_json(parts))


def _random_config(name: str) -> StudentConfig:
    if name in SHAPES:
        return SHAPES[name]
    if not Path(name).is_dir():
        sizes = ", ".join(SHAPES)
        raise UserError(f"random:{name}: choose one of {sizes}, or a directory that holds a config.json")
    return from_hf(read_hf_config(name), f"{name}/config.json", read_processor(name))


def _check_vocabulary(tokenizer: Any, config: StudentConfig, path: str) -> None:
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer numbers tokens up to {last} ({token!r}), but the model has {config.vocab_size} embeddings; "
            "use the tokenizer that the model was published with, or give the model rows for the new tokens "
            "(transformers' resize_token_embeddings)"
        )


def _eos_ids(raw: Any, key: str, config: StudentConfig, where: Path) -> list[int]:
    """The token ids under `key`, whose value is one, several or none."""
    value = raw.get(key) if isinstance(raw, dict) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if bad := [token for token in ids if not isinstance(token, int) or not 0 <= token < config.vocab_size]:
        raise UserError(
            f"{where}: {key} {bad[0]!r} is not one of the model's {config.vocab_size} tokens; fetch the file again"
        )
    return ids
