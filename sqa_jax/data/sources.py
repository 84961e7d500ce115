"""Where questions come from: the embedded samples, ScienceQA's own directory layout, or the hub."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sqa_jax.data.image import ImageFile
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import read_json, sha256_json

HUB_ID = "derek-thomas/ScienceQA"
EMBEDDED = {  # made by the package, and how that is said
    "sample": "the sample that sqa_jax makes",
    "pictures": "the questions about pictures that sqa_jax makes",
    "pictures-shifted": "the questions about pictures that sqa_jax makes, in their shifted variant",
}
_TEXT_FIELDS = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """Questions dealt to splits.

    Attributes:
      name: what it was loaded from.
      splits: {split: its questions, in split order}.
    """

    name: str
    splits: dict[str, tuple[Problem, ...]]

    def split(self, name: str) -> tuple[Problem, ...]:
        """The questions of a split. Raises `UserError` that lists the splits where there is no such one."""
        if name not in self.splits:
            raise UserError(f"{self.name}: has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]

    def all(self) -> dict[str, Problem]:
        """Every question by its pid."""
        return {problem.pid: problem for problems in self.splits.values() for problem in problems}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all texts, answers and splits."""

        def content(problem: Problem) -> list[Any]:
            fields = dataclasses.asdict(dataclasses.replace(problem, image=None))
            return [fields, problem.image is not None]

        return sha256_json({name: [content(p) for p in problems] for name, problems in self.splits.items()})


def load_problems(source: str, path: str = "", splits: str = "pid_splits.json", images: str = "ignore") -> ProblemSet:
    """Loads questions.

    Args:
      source: "sample", "pictures", "pictures-shifted", "dir" or "hub".
      path: the directory, or the hub dataset's id (or a local copy of it); "" is ScienceQA on the hub.
      splits: for "dir", the file in it that deals pids to splits.
      images: "ignore", "check" to open every image once, or "drop": questions without their images.

    Raises:
      UserError: a file is missing or damaged, or a row is unusable; one line names the file and the row.
    """
    loaders: dict[str, Callable[[], ProblemSet]] = {
        "sample": _load_sample,
        "pictures": lambda: _load_pictures("pictures", shifted=False),
        "pictures-shifted": lambda: _load_pictures("pictures-shifted", shifted=True),
        "dir": lambda: _load_directory(Path(path), splits),
        "hub": lambda: _load_hub(path or HUB_ID),
    }
    if source not in loaders:
        raise UserError(f"config.data.source is {source!r}; choose one of {', '.join(loaders)}")
    if source == "dir" and not path:
        raise UserError("config.data.path is empty; with config.data.source = 'dir' it names ScienceQA's directory")
    if images not in ("ignore", "check", "drop"):
        raise UserError(f"config.data.images is {images!r}; choose ignore, check or drop")
    problems = loaders[source]()
    if images == "drop":
        blind = {name: tuple(dataclasses.replace(p, image=None) for p in own) for name, own in problems.splits.items()}
        return dataclasses.replace(problems, splits=blind)
    if images == "check":
        for problem in problems.all().values():
            if problem.image is not None:
                problem.image.open()
    return problems


def problems_of_flag(given: str, splits: str) -> ProblemSet:
    """The questions that `--problems` names: an embedded source, or else a directory in ScienceQA's layout.

    Raises:
      UserError: as `load_problems`.
    """
    return load_problems(given) if given in EMBEDDED else load_problems("dir", given, splits)


def _load_sample() -> ProblemSet:
    from sqa_jax.data import sample

    made = sample.generate()

    def image(pid: str, row: Mapping[str, Any]) -> ImageFile:
        return ImageFile(f"sample image {pid}", lambda: sample.draw(pid, row))

    return _assign_splits("sample", made.splits, made.problems, made.captions, image)


def _load_pictures(name: str, shifted: bool) -> ProblemSet:
    from sqa_jax.data.sample import image_questions, scenes

    rows, splits = image_questions.generate(shifted)

    def image(pid: str, row: Mapping[str, Any]) -> ImageFile:
        return ImageFile(f"{name} image {pid}", lambda: scenes.draw_scene(row["scene"]))

    return _assign_splits(name, splits, rows, {}, image)


def _load_directory(directory: Path, splits: str) -> ProblemSet:
    rows = read_json(directory / "problems.json", "ScienceQA's questions by pid")
    dealt = read_json(directory / splits, "the pids of each split")
    captions_file = directory / "captions.json"
    captions = read_json(captions_file, "image captions by pid") if captions_file.exists() else {}
    captions = captions.get("captions", captions) if isinstance(captions, dict) else {}
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{directory / 'problems.json'}: holds no questions; it should be an object {{pid: question}}")
    if not isinstance(dealt, dict) or not all(isinstance(pids, list) for pids in dealt.values()):
        raise UserError(f"{directory / splits}: should be an object {{split: [pid, …]}}")

    def image(pid: str, row: Mapping[str, Any]) -> ImageFile:
        file = directory / "images" / str(row.get("split", "")) / pid / row["image"]
        return ImageFile(str(file), file.read_bytes)

    return _assign_splits(str(directory / "problems.json"), dealt, rows, captions, image, str(directory / splits))


def _assign_splits(
    name: str,
    splits: Mapping[str, Iterable[Any]],
    rows: Mapping[str, Any],
    captions: Mapping[str, str],
    image: Callable[[str, Mapping[str, Any]], ImageFile],
    splits_name: str = "",
) -> ProblemSet:
    """Rows in ScienceQA's JSON form → problems, each made once and dealt to its splits."""

    @functools.cache
    def make(pid: str, split: str) -> Problem:
        if pid not in rows:
            raise UserError(
                f"{splits_name}: split {split} lists question {pid}, which {name} does not have; fetch both files from one release"
            )
        row = rows[pid]
        picture = image(pid, row) if isinstance(row, dict) and row.get("image") else None
        return _problem(name, pid, row, split, captions.get(pid, ""), picture)

    dealt: dict[str, tuple[Problem, ...]] = {}
    for split, pids in splits.items():
        pids = [str(pid) for pid in pids]
        if len(set(pids)) != len(pids):
            twice = next(pid for pid in pids if pids.count(pid) > 1)
            raise UserError(f"{splits_name or name}: split {split} lists question {twice} twice; remove one")
        dealt[split] = tuple(make(pid, split) for pid in pids)
    return ProblemSet(name, dealt)


def _problem(name: str, pid: str, row: Any, split: str, caption: str, image: ImageFile | None) -> Problem:
    """Checks one row's types and makes the problem of it."""

    def wrong(what: str) -> UserError:
        return UserError(f"{name}: question {pid}: {what}; mend or remove the row")

    if not isinstance(row, dict):
        raise wrong("is not an object")
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str):
        raise wrong("has no question text")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise wrong("has no choices")
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise wrong(f"answer {answer!r} is not the index of a choice")
    texts = {field: row.get(field) or "" for field in _TEXT_FIELDS}
    if bad := next((field for field, text in texts.items() if not isinstance(text, str)), None):
        raise wrong(f"{bad} is not a text")
    try:
        return Problem(
            pid=pid,
            question=question,
            choices=tuple(choices),
            answer=answer,
            caption=caption,
            image=image,
            split=split,
            **texts,
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _load_hub(path: str) -> ProblemSet:
    """The hub's rows carry no pid: a question is known by its split and its place there, "test-17"."""
    import datasets

    try:
        loaded = datasets.load_dataset(path)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"{path}: cannot be loaded from the hub or as a local copy ({type(error).__name__}); check the connection and config.data.path"
        ) from None
    splits = {}
    for split, rows in loaded.items():
        if missing := {"question", "choices", "answer", "image"} - set(rows.column_names):
            raise UserError(f"{path}: has no column {sorted(missing)[0]!r}; it is not a copy of {HUB_ID}")
        rows = rows.cast_column("image", datasets.Image(decode=False))
        name = "val" if split == "validation" else split
        texts, images = rows.remove_columns("image"), rows.select_columns("image")
        splits[name] = tuple(
            _hub_problem(path, f"{name}-{i}", row, name, functools.partial(_hub_image, images, i) if pictured else None)
            for i, (row, pictured) in enumerate(zip(texts, _pictured(images), strict=True))
        )
    return ProblemSet(path, splits)


def _pictured(images: Any) -> list[bool]:
    """Which rows of a hub dataset have an image, without reading it."""
    import pyarrow.compute as pc

    column = images.data.column("image")
    held = (pc.is_valid(pc.struct_field(column, part)) for part in ("bytes", "path"))
    return pc.and_(pc.is_valid(column), pc.or_(*held)).to_pylist()


def _hub_image(images: Any, index: int) -> bytes:
    """The encoded image of a row, read from the dataset's file, which is mapped into memory."""
    encoded = images[index]["image"]
    return encoded["bytes"] or Path(encoded["path"]).read_bytes()


def _hub_problem(path: str, pid: str, row: dict[str, Any], split: str, read: Callable[[], bytes] | None) -> Problem:
    image = read and ImageFile(f"{path} image {pid}", read)
    return _problem(path, pid, {**row, "choices": list(row["choices"])}, split, "", image)
