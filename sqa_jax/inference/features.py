"""What a frozen tower sees of pictures, computed once and kept on disk: epochs then cost only the language half."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sqa_jax.batches.batch import empty_like, stack_rows
from sqa_jax.batches.dataset import config_images
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.data.images import HasImage, ImageStore
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, read_json, sha256_json, write_json
from sqa_jax.models.vision.adapter import ComputeConfig
from sqa_jax.models.vision.encode import encode_images
from sqa_jax.parallel.mesh import place_rows, replicated, row_shards
from sqa_jax.parallel.processes import barrier, is_main, main_first
from sqa_jax.runtime import Runtime

FORMAT = 1  # raised when the same tower would see something else
_AT_ONCE = 8  # pictures of one call on each data shard


def image_batcher(config, runtime: Runtime, problems: Sequence[HasImage]) -> ImageBatcher | None:
    """What puts into rows what they see of the questions' pictures; None for a student that sees none.

    Says which pictures cannot be used. Where the tower changes in training, these are the pictures themselves; else the
    features that it makes of them, once (`config.student.cache_features`).

    Raises:
      UserError: the disk is full, or a folder of pictures or features is damaged.
    """
    with main_first():
        images = config_images(config, runtime.student.config, problems)
    if images is not None and images.failed and is_main():
        print(images.failure_summary(), file=sys.stderr)
    if images is None or not config.student.cache_features or trains_vision_encoder(config.adapter):
        return images and ImageBatcher(images)
    return ImageBatcher(images, cached_features(config.data.cache, runtime, images))


def trains_vision_encoder(settings) -> bool:
    """Whether what the tower makes of a picture changes in training; `settings` are `config.adapter`."""
    return (
        bool({"full", "visual"} & set(settings.methods)) or "lora" in settings.methods and settings.lora.vision_encoder
    )


def cached_features(cache: str | Path, runtime: Runtime, images: ImageStore) -> np.ndarray:
    """The features of all pictures, [features, D] in the type of the computation, from disk or computed.

    They lie in a folder whose name is the fingerprint of pictures, student and type.

    Raises:
      UserError: as `image_batcher`.
    """
    dtype, count = np.dtype(runtime.decoder.dtype), int(images.feature_offsets[-1])
    made_of = [FORMAT, images.pieces_fingerprint, runtime.student.fingerprint, dtype.name]
    path, shape = Path(cache) / f"features-{sha256_json(made_of)[:16]}", (count, runtime.student.config.hidden_size)
    if not count:
        return np.zeros(shape, dtype)
    there = path.exists()
    barrier()  # so that all processes have looked before one of them writes
    if not there:
        _compute(path, runtime, images, shape, dtype)
    read_json(path / "manifest.json", "what these features are of (remove this folder to compute them again)")
    try:
        return np.memmap(path / "features.bin", dtype, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); remove this folder and run again") from None


def _compute(path: Path, runtime: Runtime, images: ImageStore, shape: tuple[int, int], dtype: np.dtype) -> None:
    """All processes compute together; the first one writes."""
    mesh, student, decoder = runtime
    vision, rows = images.vision, ImageBatcher(images)
    at_once = _AT_ONCE * row_shards(mesh)

    how = ComputeConfig(decoder.dtype, rows=decoder.rows)
    # Replicated, so that the first process can read it.
    run = jax.jit(lambda params, inputs: encode_images(vision, params, inputs, how), out_shardings=replicated(mesh))
    counts = images.feature_offsets[1:] - images.feature_offsets[:-1]
    order = np.argsort(counts, kind="stable")  # pictures of a batch are about equally large
    with atomic_directory(path) if is_main() else contextlib.nullcontext() as beside:
        out = np.memmap(beside / "features.bin", dtype, "w+", shape=shape) if is_main() else None
        bar = tqdm(total=len(order), unit="picture", desc="features", disable=not is_main())
        for start in range(0, len(order), at_once):
            own = order[start : start + at_once]
            room = rows.room(int(counts[own].max()))
            spans = [slice(*images.feature_offsets[number : number + 2]) for number in own]
            tokens = [np.arange(span.start, span.stop) + images.vocabulary for span in spans]
            made = [rows(line, room)[1] for line in tokens]
            made += [empty_like(made[0])] * (at_once - len(own))
            inputs = place_rows(stack_rows(made).encoder, mesh, at_once)
            found = np.asarray(run(student.params["vision"], inputs))
            if out is not None:
                for span, features in zip(spans, found, strict=False):
                    out[span] = features[: span.stop - span.start]
            bar.update(len(own))
        bar.close()
        if out is not None:
            out.flush()
            write_json(beside / "manifest.json", {"pictures": len(order), "shape": list(shape), "dtype": dtype.name})
    barrier()
