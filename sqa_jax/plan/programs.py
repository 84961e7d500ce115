"""What a configuration runs on a slice, from shapes alone: the training step and the loop that generates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from sqa_jax import adapters
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.packing import Limits, capacity_for, choose_limits, pack_row
from sqa_jax.checkpoints.weights import param_shapes
from sqa_jax.data.images import ImageStore
from sqa_jax.errors import UserError
from sqa_jax.inference.features import trains_vision_encoder
from sqa_jax.inference.generate import Generator
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.flops import forward_flops, training_flops, vision_flops
from sqa_jax.models.vision.registry import vision_family
from sqa_jax.parallel.mesh import check_rows, row_shards
from sqa_jax.parallel.rules import shardings
from sqa_jax.plan.communication import expected_bytes
from sqa_jax.runtime import make_decoder, param_dtype
from sqa_jax.training.optimizer import make_optimizer
from sqa_jax.training.step import compile_step, init_state, make_step

# ScienceQA's 12,726 training questions as configs/study.py words them (QCM-AE), in SmolLM2's tokens: 146 tokens a
# question, half of them to be learned, measured on 540 questions.
_SCIENCEQA_QUESTIONS, _MEAN_LENGTH, _TARGET_SHARE = 12_726, 146, 0.5
_IMAGE_SHARE, _IMAGE_SIZE = 0.49, (500, 350)  # part of them that has a picture, and the pixels of a usual one


class Data(NamedTuple):
    """What one epoch holds.

    Attributes:
      tokens: without padding.
      mean_length: tokens of a sequence.
      target_share: part of the tokens that is learned.
      limits: shape of a packed row.
      source: where these numbers come from.
      feature_share: part of the tokens that shows pictures.
      picture: features of a picture on average.
    """

    tokens: float
    mean_length: float
    target_share: float
    limits: Limits
    source: str
    feature_share: float = 0.0
    picture: float = 0.0


class Step(NamedTuple):
    """A program and what is known of it before it is traced and compiled.

    Attributes:
      lower: traces it, to be compiled.
      arguments: bytes on one chip: parameters, state and batch.
      state: of them, those of the state, which is donated.
      parameters, trained: numbers of the student and of the adapter.
      tokens: places in the rows of one step.
      expected: bytes that a chip sends in one step, see `sqa_jax.plan.communication`.
      model_flops: of one step on all chips, see `sqa_jax.models.flops`.
    """

    lower: Callable[[], jax.stages.Lowered]
    arguments: int
    state: int
    parameters: int
    trained: int
    tokens: int
    model_flops: float
    expected: dict[str, float]


def data_of(config, student: DecoderConfig) -> Data:
    """The epoch of a configuration: of its dataset, which is built if it is not there, as training does.

    For a random student it is about what ScienceQA's training questions make.

    Raises:
      UserError: the data cannot be read; `config.plan.tokens` does without them.
    """
    from sqa_jax.batches.dataset import build_or_reuse, config_images, load_config_problems, training_problems
    from sqa_jax.batches.loader import packed_rows
    from sqa_jax.checkpoints.tokenizer import load_tokenizer

    virtual, length = adapters.soft_prompt_tokens(config.adapter), config.train.row_length
    if config.plan.tokens or config.student.path.startswith("random:"):
        picture = _typical_image_features(student)
        mean = _MEAN_LENGTH + _IMAGE_SHARE * picture
        targets, share = _TARGET_SHARE * _MEAN_LENGTH, _IMAGE_SHARE * picture / mean
        one = np.array([min(math.ceil(mean) + virtual.count, length)])
        limits = choose_limits(one, np.array([min(math.ceil(targets), length)]), length, [""])
        limits = limits._replace(both_ways=student.prefix_lm)
        if picture:
            if picture > length:
                raise UserError(
                    f"a usual picture takes {picture} tokens, more than config.train.row_length = {length}; raise it, or lower "
                    "config.student.max_image_tokens"
                )
            seen = np.array([math.ceil(share * one[0])])
            limits = limits._replace(
                features=_empty_image_batcher(student).room(max(picture, capacity_for(one, seen, length)))
            )
        tokens = config.plan.tokens or _SCIENCEQA_QUESTIONS * mean
        source = "config.plan.tokens" if config.plan.tokens else "about ScienceQA's training questions"
        return Data(tokens, mean, targets / mean, limits, source, share, picture)
    tokenizer, problems = load_tokenizer(config.student.path, config.student.revision), load_config_problems(config)
    images = config_images(config, student, training_problems(config, problems))
    dataset, _ = build_or_reuse(config, tokenizer, problems, images)
    seen = images and ImageBatcher(images)
    rows = packed_rows(dataset, config, tokenizer.pad_token_id, virtual, student.prefix_lm, seen)
    tokens, prompts = sum(map(len, rows.tokens)), int(np.sum(rows.prompt_lengths))
    about = Data(tokens, tokens / len(rows.tokens), 1 - prompts / tokens, rows.limits, str(dataset.path))
    if seen is None:
        return about
    features = sum(map(seen.count, rows.tokens))
    return about._replace(
        feature_share=features / tokens, picture=float(images.feature_offsets[-1]) / max(1, len(images.sizes))
    )


def _typical_image_features(student: DecoderConfig) -> int:
    """Features of a usual picture; 0 for a student that sees none."""
    if student.vision is None:
        return 0
    made = vision_family(student.vision).preprocess_image(student.vision, Image.new("RGB", _IMAGE_SIZE))
    return len(made.pieces) * student.vision.features_per_piece


def _empty_image_batcher(student: DecoderConfig, features: np.ndarray | None = None) -> ImageBatcher:
    """What puts nothing into rows that could hold pictures."""
    empty = ImageStore(student.vision, student.vocab_size, "", np.zeros(0), np.zeros((0, 3), int), {}, {})
    return ImageBatcher(empty, features)


def training_step(config, student: DecoderConfig, mesh: Mesh, data: Data) -> Step:
    """The step that `sqa_jax.train` runs, for the mesh's devices, which need not be here.

    Raises:
      UserError: the configuration, the mesh, the batch and the student do not fit each other.
    """
    settings = config.train
    check_rows(settings.batch_rows, mesh, "train.batch_rows")
    decoder = make_decoder(config, student, mesh)
    base, adapter = _trees(config, student, mesh)
    optimizer = make_optimizer(config.optimizer, 1000)  # steps of the run, which do not change the program
    state = jax.eval_shape(lambda adapter: init_state(adapter, optimizer), adapter)
    row = pack_row([], [], data.limits, 0)
    through = trains_vision_encoder(config.adapter)
    known = config.student.cache_features and not through
    if student.vision is not None:
        features = np.zeros((0, student.hidden_size), decoder.dtype) if known else None
        _, images = _empty_image_batcher(student, features)(row.tokens, data.limits.features)
        row = row._replace(images=images)
    leading = (settings.accumulate, settings.batch_rows)
    batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype), row)
    step = compile_step(make_step(config.adapter, decoder, optimizer, config.seed), state, base, mesh)
    tokens = settings.accumulate * settings.batch_rows * data.limits.tokens
    held = bytes_on_chip(state, mesh)
    sent = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(batch)) // row_shards(mesh)
    targets = data.target_share * tokens
    seen = (
        0.0
        if known or student.vision is None
        else vision_flops(student.vision, data.feature_share * tokens, data.picture)
    )
    methods = tuple(config.adapter.methods)
    return Step(
        functools.partial(step.lower, state, base, batch),
        held + bytes_on_chip(base, mesh) + sent,
        held,
        _size(base or adapter),
        _size(adapter),
        tokens,
        training_flops(student, methods, _size(adapter), tokens, data.mean_length / 2, targets, seen, through),
        expected_bytes(student, base, adapter, mesh, settings, data.limits.targets, decoder.dtype),
    )


def decode_loop(config, student: DecoderConfig, mesh: Mesh) -> tuple[jax.stages.Lowered, int, float, int]:
    """The loop that writes `config.eval.max_new_tokens` tokens of `config.eval.batch_questions` texts.

    Returns:
      The lowered program; bytes of parameters on a chip; model operations of all chips; tokens written.

    Raises:
      UserError: the configuration, the mesh and the student do not fit each other.
    """
    settings, virtual = config.eval, adapters.soft_prompt_tokens(config.adapter).count
    base, adapter = _trees(config, student, mesh)
    decoder = make_decoder(config, student, mesh)
    any_end = (0,)  # which token ends a text does not change the program
    generator = Generator(
        config.adapter, decoder, mesh, any_end, settings.max_new_tokens, settings.batch_questions, settings.temperature
    )
    width = config.recipe.max_prompt + virtual
    tokens = generator.batch * settings.max_new_tokens
    return (
        generator.lower_decode(adapter, base, width),
        bytes_on_chip(base, mesh) + bytes_on_chip(adapter, mesh),
        forward_flops(student, tokens, width + settings.max_new_tokens / 2, tokens),
        tokens,
    )


def _trees(config, student: DecoderConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes of the base, which is empty where the adapter is the whole model, and of the adapter."""
    adapters.check_methods(config.adapter.methods)
    base = param_shapes(student, param_dtype(config, mesh))
    words = (0,)  # those that a prompt starts from do not change the program
    adapter = jax.eval_shape(
        lambda base: adapters.init_adapter(config.adapter, student, base, config.seed, words), base
    )
    return {} if "full" in config.adapter.methods else base, adapter


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def bytes_on_chip(tree: Any, mesh: Mesh) -> int:
    """Bytes of a tree of shapes on one device of the mesh.

    Raises:
      UserError: as `sqa_jax.parallel.rules.spec_for`.
    """
    placed = shardings(tree, mesh)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    )
