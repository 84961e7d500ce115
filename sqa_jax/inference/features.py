"""Cached image features of a frozen vision encoder, computed once and kept on disk: epochs then cost the decoder only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from sqa_jax.batches.batch import empty_like, stack_rows
from sqa_jax.batches.config_data import config_images
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.data.images import HasImage, ImageStore
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, read_json, sha256_json, write_json
from sqa_jax.models.vision.adapter import ComputeConfig
from sqa_jax.models.vision.encode import encode_images
from sqa_jax.parallel.mesh import place_rows, replicated, row_shards
from sqa_jax.parallel.processes import barrier, is_main, main_first
from sqa_jax.runtime import Runtime

FORMAT = 1  # raised when the same encoder would give other features
_IMAGES_PER_SHARD = 8  # of one call


def image_batcher(config, runtime: Runtime, problems: Sequence[HasImage]) -> ImageBatcher | None:
    """The source of the images of packed rows; None for a model of text.

    Reports images that cannot be used. Where the vision encoder is trained, rows get the images themselves; else its
    cached features (`config.student.cache_features`).

    Raises:
      UserError: the disk is full, or a folder of images or features is damaged.
    """
    with main_first():
        images = config_images(config, runtime.student.config, problems)
    if images is None:
        return None
    if images.failed and is_main():
        print(images.failure_summary(), file=sys.stderr)
    if not config.student.cache_features or trains_vision_encoder(config.adapter):
        return ImageBatcher(images)
    return ImageBatcher(images, cached_features(config.data.cache, runtime, images))


def trains_vision_encoder(settings) -> bool:
    """Whether features of an image change in training; `settings` are `config.adapter`."""
    return bool({"full", "visual"} & set(settings.methods)) or (
        "lora" in settings.methods and settings.lora.vision_encoder
    )


def cached_features(cache: str | Path, runtime: Runtime, images: ImageStore) -> Shaped[np.ndarray, "F D"]:
    """The features of all images, in the dtype of the computation, from disk or computed.

    Their folder is named by the fingerprint of images, model and dtype.

    Raises:
      UserError: as `image_batcher`.
    """
    dtype, count = np.dtype(runtime.decoder.dtype), int(images.feature_offsets[-1])
    inputs = [FORMAT, images.pieces_fingerprint, runtime.student.fingerprint, dtype.name]
    path, shape = Path(cache) / f"features-{sha256_json(inputs)[:16]}", (count, runtime.student.config.hidden_size)
    if not count:
        return np.zeros(shape, dtype)
    exists = path.exists()
    barrier()  # so that all processes have looked before one of them writes
    if not exists:
        _compute(path, runtime, images, shape, dtype)
    read_json(path / "manifest.json", "the inputs of these features (remove this folder to compute them again)")
    try:
        return np.memmap(path / "features.bin", dtype, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); remove this folder and run again") from None


def _compute(path: Path, runtime: Runtime, images: ImageStore, shape: tuple[int, int], dtype: np.dtype) -> None:
    """All processes compute together; the first one writes."""
    mesh, student, decoder = runtime
    compute = ComputeConfig(decoder.dtype, batch_sharding=decoder.batch_sharding)

    def encode(params, inputs):
        return encode_images(images.vision, params, inputs, compute)

    run = jax.jit(encode, out_shardings=replicated(mesh))  # replicated, so that the first process has all of them
    batcher, rows = ImageBatcher(images), _IMAGES_PER_SHARD * row_shards(mesh)
    counts = np.diff(images.feature_offsets)
    order = np.argsort(counts, kind="stable")  # so that images of a batch are about equally large
    with contextlib.ExitStack() as stack:
        out = beside = None
        if is_main():
            beside = stack.enter_context(atomic_directory(path))
            out = np.memmap(beside / "features.bin", dtype, "w+", shape=shape)
        bar = stack.enter_context(tqdm(total=len(order), unit="image", desc="features", disable=not is_main()))
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            spans = [slice(*images.feature_offsets[number : number + 2]) for number in chosen]
            inputs = _encoder_inputs(batcher, spans, batcher.padded_capacity(int(counts[chosen].max())), rows)
            features = np.asarray(run(student.params["vision"], place_rows(inputs, mesh, rows)))
            if out is not None:
                for row, span in zip(features, spans, strict=False):
                    out[span] = row[: span.stop - span.start]
            bar.update(len(chosen))
        if out is not None and beside is not None:
            out.flush()
            write_json(beside / "manifest.json", {"pictures": len(order), "shape": list(shape), "dtype": dtype.name})
    barrier()


def _encoder_inputs(batcher: ImageBatcher, spans: Sequence[slice], capacity: int, rows: int):
    """One image in each row, and empty rows up to `rows`."""
    vocab_size = batcher.images.vocab_size
    inputs = [batcher(np.arange(span.start, span.stop) + vocab_size, capacity)[1].encoder for span in spans]
    return stack_rows(inputs + [empty_like(inputs[0])] * (rows - len(inputs)))
