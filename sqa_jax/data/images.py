"""Images of questions, decoded and resized once for a vision encoder, each distinct content once.

A folder holds them, named by the fingerprint of everything that decides them:

    pieces.bin   pieces of all images, one image after the other: tiles, or blocks of patches
    index.json   shape of a piece; of each image its pieces, rows and columns; {hash of a file's content: number of its
                 image}; and of images that cannot be used, why

A piece becomes a fixed number of features, so each feature has a number among those of all images, and its image token
in a prompt is V + that number, V being the size of the vocabulary. Packing, scoring and generation so handle images as
they handle text. Devices get the features, or pieces, of the rows of a batch, numbered by row: see
`sqa_jax.batches.images.ImageBatcher`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from sqa_jax.data.image import ImageFile
from sqa_jax.errors import UnusableImage, UserError
from sqa_jax.files import atomic_directory, read_json, sha256_json, write_json
from sqa_jax.models.identity import original_fields
from sqa_jax.models.vision.registry import PreprocessedImage, VisionConfig, vision_family

FORMAT = 1  # raised when the same images would make other pieces
_HASHED_PACKAGE = (
    "sqa_jax.students.vision"  # where families were first: it stays in fingerprints, so that folders stay valid
)


@runtime_checkable
class HasImage(Protocol):
    """A question, or a request about one, with its image."""

    @property
    def pid(self) -> str: ...

    @property
    def image(self) -> ImageFile | None: ...


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """Preprocessed images of questions.

    Attributes:
      vision: configuration of the vision encoder that they are for.
      vocab_size: V, the first image token's id.
      pieces_fingerprint: hash of everything that decides the pieces.
      pieces: of all images, mapped from disk.
      sizes: of each image its pieces, rows and columns.
      image_index: {pid: number of its image}.
      failed: {pid: why its image cannot be used}; the same text for every image with the same fault.
      first_failed: name of the first of these images; "" for none.
    """

    vision: VisionConfig
    vocab_size: int
    pieces_fingerprint: str
    pieces: UInt8[np.ndarray, "n ..."]
    sizes: Int[np.ndarray, "N 3"]
    image_index: Mapping[str, int]
    failed: Mapping[str, str]
    first_failed: str = ""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the image in each question's prompt."""
        return sha256_json([self.pieces_fingerprint, dict(self.image_index), dict(self.failed)])

    @property
    def failures(self) -> dict[str, int]:
        """{what is wrong with an image: questions}, the most frequent first."""
        return dict(collections.Counter(self.failed.values()).most_common())

    def failure_summary(self) -> str:
        """What is wrong with images, in one line; "" for nothing."""
        if not self.failed:
            return ""
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.failures.items())
        return (
            f"{len(self.failed)} of {len(self.failed) + len(self.image_index)} questions' images cannot be used "
            f"({counts}); the first is {self.first_failed}"
        )

    @functools.cached_property
    def feature_offsets(self) -> Int[np.ndarray, " offsets"]:
        """The number of each image's first feature, and the number of features in all."""
        return np.concatenate([[0], np.cumsum(self.sizes[:, 0])]) * self.vision.features_per_piece

    def prompt_ids(self, pid: str, tokenizer: Any) -> list[int]:
        """The image's part of a question's prompt, its image tokens numbered from V on; [] for no image."""
        if (number := self.image_index.get(pid)) is None:
            return []
        _, rows, columns = self.sizes[number].tolist()
        ids = vision_family(self.vision).prompt_ids(self.vision, rows, columns, tokenizer)
        image_tokens = iter(range(*(self.vocab_size + self.feature_offsets[number : number + 2]).tolist()))
        return [next(image_tokens) if token == self.vision.image_token else token for token in ids]

    def renumber_by_row(self, tokens: Int[np.ndarray, " T"]) -> tuple[Int[np.ndarray, " T"], list[int]]:
        """A row's ids with its image tokens numbered from V on, image by image, and the numbers of its images."""
        is_image = tokens >= self.vocab_size
        features = tokens[is_image] - self.vocab_size
        owners = np.searchsorted(self.feature_offsets, features, side="right") - 1
        numbers, order = np.unique(owners, return_inverse=True)
        starts = np.concatenate([[0], np.cumsum(np.diff(self.feature_offsets)[numbers])])
        local = tokens.copy()
        local[is_image] = self.vocab_size + features - self.feature_offsets[owners] + starts[order]
        return local, numbers.tolist()

    def pieces_of(self, number: int) -> UInt8[np.ndarray, "n ..."]:
        """The pieces of an image."""
        start, end = self.feature_offsets[number : number + 2] // self.vision.features_per_piece
        return self.pieces[start:end]


def load_images(cache: str | Path, vision: VisionConfig, vocab_size: int, problems: Sequence[HasImage]) -> ImageStore:
    """The images of questions, from their folder, which is made where it is not there.

    Images that cannot be read, or are of a shape that the vision encoder does not take, are left out with the reason:
    they do not stop a run, and are never replaced.

    Args:
      cache: where folders are kept, `config.data.cache`.

    Raises:
      UserError: the disk is full, or a folder is damaged.
    """
    hashes: dict[str, str] = {}
    failed: dict[str, str] = {}
    for problem in problems:
        if problem.image is not None:
            try:
                hashes[problem.pid] = hashlib.sha256(problem.image.content()).hexdigest()
            except UnusableImage as error:
                failed[problem.pid] = error.reason
    fingerprint = _fingerprint(vision, hashes.values())
    path = Path(cache) / f"pictures-{fingerprint[:16]}"
    if not path.exists():
        first_of = {hashes[problem.pid]: problem for problem in reversed(problems) if problem.pid in hashes}
        _preprocess_all(path, vision, dict(sorted(first_of.items())))
    pieces, sizes, index = _read_folder(path)
    numbers = {pid: index["numbers"][content] for pid, content in hashes.items() if content in index["numbers"]}
    failed |= {pid: index["failed"][content] for pid, content in hashes.items() if content in index["failed"]}
    first = next((problem.image.name for problem in problems if problem.image and problem.pid in failed), "")
    return ImageStore(vision, vocab_size, fingerprint, pieces, sizes, numbers, failed, first)


def _fingerprint(vision: VisionConfig, hashes: Iterable[str]) -> str:
    """Of the contents and their preprocessing."""
    family = vision_family(vision).__name__.rpartition(".")[2]
    preprocessing = {
        "format": FORMAT,
        "vision": original_fields(vision),
        "pieces": f"{_HASHED_PACKAGE}.{family}",
    }
    return sha256_json([preprocessing, sorted(set(hashes))])


def _read_folder(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Pieces, sizes and index.

    Raises:
      UserError: it is damaged.
    """
    index = read_json(path / "index.json", "the list of these images (remove this folder to make them again)")
    try:
        shape = (sum(size[0] for size in index["sizes"]), *index["shape"])
        if (path / "pieces.bin").stat().st_size != math.prod(shape):
            raise ValueError("pieces.bin is cut off")
        pieces = np.memmap(path / "pieces.bin", np.uint8, "r", shape=shape) if shape[0] else np.zeros(shape, np.uint8)
        sizes = np.asarray(index["sizes"], np.int64).reshape(-1, 3)
        if not isinstance(index["numbers"], dict) or not isinstance(index["failed"], dict):
            raise TypeError("index.json is not as it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove this folder and run again") from None
    return pieces, sizes, index


def _preprocess_all(path: Path, vision: VisionConfig, first_of: Mapping[str, HasImage]) -> None:
    """Decodes the images of {hash of a content: a question that has it} and writes them, in that order."""
    numbers: dict[str, int] = {}
    failed: dict[str, str] = {}
    sizes, shape = [], ()
    with atomic_directory(path) as beside:
        with open(beside / "pieces.bin", "wb") as file:
            bar = tqdm(total=len(first_of), unit="image", desc="images", leave=False)
            for content, image in zip(first_of, _preprocessed(vision, list(first_of.values())), strict=True):
                bar.update()
                if isinstance(image, UnusableImage):
                    failed[content] = image.reason
                    continue
                shape = image.pieces.shape[1:]
                numbers[content] = len(sizes)
                sizes.append([len(image.pieces), image.rows, image.columns])
                file.write(image.pieces.tobytes())
            bar.close()
        index = {"shape": list(shape), "sizes": sizes, "numbers": numbers, "failed": failed}
        write_json(beside / "index.json", index)


def _preprocessed(vision: VisionConfig, problems: Sequence[HasImage]) -> Iterator[PreprocessedImage | UnusableImage]:
    """Each image's pieces, or why it has none, in order; a few are decoded ahead, and no more are in memory."""

    def preprocess(problem: HasImage) -> PreprocessedImage | UnusableImage:
        assert problem.image is not None
        try:
            return vision_family(vision).preprocess_image(vision, problem.image.open())
        except UnusableImage as error:
            return error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        for problem in problems:
            if len(ahead) == 2 * (os.cpu_count() or 1):
                yield ahead.popleft().result()
            ahead.append(pool.submit(preprocess, problem))
        yield from (future.result() for future in ahead)
