"""The pictures of questions, decoded and resized once, each content once, as the student's tower wants them.

A folder holds them, named by the fingerprint of everything that decides them:

    pieces.bin   pieces of all pictures, one behind the other: tiles of a picture, or blocks of patches
    index.json   shape of a piece; of each picture its pieces, rows and columns; which content (by its hash) is which
                 picture; and of those that cannot be used, why

A piece becomes a fixed number of features, so each feature has a number among those of all pictures, and a prompt shows
it as token V + that number, V being the size of the vocabulary. Packing, scoring and generation so handle pictures as
they handle words; what goes to the devices are the features, or pieces, of the rows of a batch, numbered by row.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from sqa_jax.data.image import ImageFile
from sqa_jax.errors import UnusableImage, UserError
from sqa_jax.files import atomic_directory, read_json, sha256_json, write_json
from sqa_jax.models.vision.registry import Picture, Vision, vision_family

FORMAT = 1  # raised when the same pictures would make other pieces


class PreparedImages(Protocol):
    """A question, or what is asked of it, with the picture that belongs to it."""

    @property
    def pid(self) -> str: ...

    @property
    def image(self) -> ImageFile | None: ...


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """Pictures of questions.

    Attributes:
      vision: what the student's checkpoint says about pictures.
      vocabulary: V, the first token that stands for a feature.
      pieces_fingerprint: of all that decides the pieces.
      pieces: [pieces of all pictures, …], mapped from disk.
      sizes: [N, 3] of each picture its pieces, rows and columns.
      number_of: {pid: number of its picture}.
      failed: {pid: why its picture cannot be used}, the same words for all with the same fault.
      first_failed: where the picture of the first of them was looked for; "" for none.
    """

    vision: Vision
    vocabulary: int
    pieces_fingerprint: str
    pieces: np.ndarray
    sizes: np.ndarray
    number_of: Mapping[str, int]
    failed: Mapping[str, str]
    first_failed: str = ""

    @property
    def fingerprint(self) -> str:
        """Of all that decides what each question is shown."""
        return sha256_json([self.pieces_fingerprint, dict(self.number_of), dict(self.failed)])

    @property
    def failures(self) -> dict[str, int]:
        """Questions by what is wrong with their picture, the most frequent first."""
        return dict(collections.Counter(self.failed.values()).most_common())

    def complaint(self) -> str:
        """What is wrong with pictures, in one line; "" for nothing."""
        if not self.failed:
            return ""
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.failures.items())
        return (
            f"{len(self.failed)} of {len(self.failed) + len(self.number_of)} questions' pictures cannot be used "
            f"({counts}); the first is {self.first_failed}"
        )

    @functools.cached_property
    def firsts(self) -> np.ndarray:
        """[N + 1] the number of each picture's first feature, and how many there are in all."""
        return np.concatenate([[0], np.cumsum(self.sizes[:, 0])]) * self.vision.features_of_piece

    def prompt(self, pid: str, tokenizer: Any) -> list[int]:
        """What shows a question's picture in its prompt, features' tokens included; [] where it has none."""
        if (number := self.number_of.get(pid)) is None:
            return []
        _, rows, columns = self.sizes[number].tolist()
        ids = vision_family(self.vision).prompt_ids(self.vision, rows, columns, tokenizer)
        features = iter(range(self.vocabulary + self.firsts[number], self.vocabulary + self.firsts[number + 1]))
        return [int(next(features)) if token == self.vision.image_token else token for token in ids]

    def by_row(self, tokens: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """A row's ids [T] with its features numbered from V on, picture by picture, and the pictures' numbers."""
        seen = tokens >= self.vocabulary
        features = tokens[seen] - self.vocabulary
        owners = np.searchsorted(self.firsts, features, side="right") - 1
        numbers, places = np.unique(owners, return_inverse=True)
        starts = np.concatenate([[0], np.cumsum((self.firsts[1:] - self.firsts[:-1])[numbers])])
        local = tokens.copy()
        local[seen] = self.vocabulary + features - self.firsts[owners] + starts[places]
        return local, numbers.tolist()

    def pieces_of(self, number: int) -> np.ndarray:
        """The pieces of a picture."""
        own = self.firsts[number : number + 2] // self.vision.features_of_piece
        return self.pieces[own[0] : own[1]]


def load_pictures(cache: str | Path, vision: Vision, vocabulary: int, problems: Sequence[PreparedImages]) -> ImageStore:
    """The pictures of questions, from their folder, or made.

    What cannot be read, or is of a form that the tower does not take, is left out and says why: nothing stops for it,
    and it is never replaced.

    Args:
      cache: where folders are kept, `config.data.cache`.

    Raises:
      UserError: the disk is full, or a folder is damaged.
    """
    contents: dict[str, str] = {}
    failed: dict[str, str] = {}
    for problem in problems:
        if problem.image is not None:
            try:
                contents[problem.pid] = hashlib.sha256(problem.image.content()).hexdigest()
            except UnusableImage as error:
                failed[problem.pid] = error.reason
    preprocessing = {"format": FORMAT, "vision": dataclasses.asdict(vision), "pieces": vision_family(vision).__name__}
    fingerprint = sha256_json([preprocessing, sorted(set(contents.values()))])
    path = Path(cache) / f"pictures-{fingerprint[:16]}"
    if not path.exists():
        first_of = {content: problem for problem in reversed(problems) if (content := contents.get(problem.pid))}
        _make(path, vision, dict(sorted(first_of.items())))
    index = read_json(path / "index.json", "the list of these pictures (remove this folder to make them again)")
    try:
        shape = (sum(size[0] for size in index["sizes"]), *index["shape"])
        if (path / "pieces.bin").stat().st_size != math.prod(shape):
            raise ValueError("pieces.bin is cut off")
        pieces = np.memmap(path / "pieces.bin", np.uint8, "r", shape=shape) if shape[0] else np.zeros(shape, np.uint8)
        numbers = {pid: index["numbers"][content] for pid, content in contents.items() if content in index["numbers"]}
        failed |= {pid: index["failed"][content] for pid, content in contents.items() if content in index["failed"]}
        sizes = np.asarray(index["sizes"], np.int64).reshape(-1, 3)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove this folder and run again") from None
    first = next((problem.image.name for problem in problems if problem.pid in failed), "")
    return ImageStore(vision, vocabulary, fingerprint, pieces, sizes, numbers, failed, first)


def _make(path: Path, vision: Vision, first_of: Mapping[str, PreparedImages]) -> None:
    """Decodes pictures of {content: a question that has it} and writes them, in that order."""
    numbers: dict[str, int] = {}
    failed: dict[str, str] = {}
    sizes, shape = [], ()
    with atomic_directory(path) as beside:
        with open(beside / "pieces.bin", "wb") as file:
            bar = tqdm(total=len(first_of), unit="picture", desc="pictures", leave=False)
            for content, made in zip(first_of, _decoded(vision, list(first_of.values())), strict=True):
                bar.update()
                if isinstance(made, UnusableImage):
                    failed[content] = made.reason
                    continue
                shape = made.pieces.shape[1:]
                numbers[content] = len(sizes)
                sizes.append([len(made.pieces), made.rows, made.columns])
                file.write(made.pieces.tobytes())
            bar.close()
        index = {"shape": list(shape), "sizes": sizes, "numbers": numbers, "failed": failed}
        write_json(beside / "index.json", index)


def _decoded(vision: Vision, problems: Sequence[PreparedImages]) -> Iterator[Picture | UnusableImage]:
    """Each picture's pieces, or why it has none, in order; a few are decoded ahead, and no more are in memory."""

    def one(problem: PreparedImages) -> Picture | UnusableImage:
        try:
            return vision_family(vision).picture(vision, problem.image.open())
        except UnusableImage as error:
            return error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        for problem in problems:
            if len(ahead) == 2 * os.cpu_count():
                yield ahead.popleft().result()
            ahead.append(pool.submit(one, problem))
        yield from (future.result() for future in ahead)
