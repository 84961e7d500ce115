"""Pre-tokenized distillation datasets: Arrow rows beside a manifest, one folder a fingerprint."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sqa_jax
from sqa_jax.checkpoints.tokenizer import fingerprint as tokenizer_fingerprint
from sqa_jax.data.images import ImageStore, PreparedImages, load_pictures
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet, load_problems
from sqa_jax.data.teacher_records import KINDS, TeacherRecord, load_records, make_records
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, read_json, sha256_file, sha256_json, write_json
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.prompts.encode import Encoded, Encoder
from sqa_jax.prompts.recipes import Example, Unusable, check_recipe, examples
from sqa_jax.prompts.tool_traces import read_traces, trace_rows

FORMAT = 3  # raised when the same inputs would make other rows
_BATCH = 1000  # questions tokenized in one call
_NAMED = 50  # pids that the manifest names for each reason
_Row = tuple[str, str, Encoded]  # the question's pid, whose supervision it is, and its tokens


class Columns(NamedTuple):
    """The rows of a dataset.

    Attributes:
      tokens: ids (int32) of each.
      prompt_lengths: how many of them are prompt.
      behind_pictures: how many of them end with the prompt's picture; 0 where there is none.
      pids: the question that each was made of.
    """

    tokens: list[np.ndarray]
    prompt_lengths: np.ndarray
    behind_pictures: np.ndarray
    pids: list[str]


class DistillationDataset(NamedTuple):
    """A built dataset: where it is, and its manifest. Rows are read when `columns` is called."""

    path: Path
    manifest: dict[str, Any]

    def columns(self) -> Columns:
        """What packing wants of every row.

        Raises:
          UserError: the Arrow files are damaged.
        """
        import datasets

        try:
            rows = datasets.load_from_disk(str(self.path / "rows")).with_format("numpy")
            tokens, pids = rows["tokens"][:], rows["pid"][:]
            prompt_lengths, behind_pictures = rows["prompt_length"][:], rows["behind_picture"][:]
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(
                f"{self.path}: damaged ({type(error).__name__}); remove this folder and run again"
            ) from None
        if len(tokens) != self.manifest["rows"]:
            raise UserError(
                f"{self.path}: holds {len(tokens)} rows, its manifest says {self.manifest['rows']}; remove this folder and run again"
            )
        tokens = [np.asarray(t, np.int32) for t in tokens]
        return Columns(tokens, np.asarray(prompt_lengths), np.asarray(behind_pictures), [str(p) for p in pids])


def load_config_problems(config) -> ProblemSet:
    """The questions that `config.data` names."""
    data = config.data
    return load_problems(data.source, data.path, data.splits, data.images)


def config_pictures(config, student: StudentConfig, problems: Sequence[PreparedImages]) -> ImageStore | None:
    """The pictures of questions, for a student that sees; None for one that does not."""
    if student.vision is None:
        return None
    return load_pictures(config.data.cache, student.vision, student.vocab_size, problems)


def encoder_for(config, tokenizer: Any, pictures: ImageStore | None = None) -> Encoder:
    """The one encoder of a configuration, for training and for inference."""
    recipe = config.recipe
    return Encoder(tokenizer, recipe.max_prompt, recipe.chat, recipe.caption, pictures=pictures)


def config_records(config, problems: ProblemSet) -> list[TeacherRecord]:
    """The teacher records that `config.data.teacher` names; "sample" stands for the sample's simulated teacher."""
    paths = [path for path in config.data.teacher if path != "sample"]
    records = load_records(paths, problems.all())
    if "sample" in config.data.teacher:
        from sqa_jax.data import sample

        records += make_records(sample.teacher_replies(sample.generate()), problems.all())
    return records


def records_by_pid(records: Iterable[TeacherRecord]) -> dict[str, dict[str, list[TeacherRecord]]]:
    """{pid: {kind: records}}, as recipes want them."""
    by_pid: dict[str, dict[str, list[TeacherRecord]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in records:
        # A reply without content still says, with its status, why there is no example.
        for kind in record.kinds or KINDS:
            by_pid[record.pid][kind].append(record)
    return by_pid


def build_or_reuse(
    config, tokenizer: Any, problems: ProblemSet, pictures: ImageStore | None = None
) -> tuple[DistillationDataset, bool]:
    """The dataset of a configuration's training split, and whether it was there already.

    A dataset is written beside its place and renamed when it is whole, so one that is there is whole.

    Args:
      pictures: of the training questions, for a student that sees.

    Raises:
      UserError: the configuration, the data or the disk does not allow it.
    """
    check_recipe(config.recipe, bool(config.data.teacher))
    inputs = _fingerprint_inputs(config, tokenizer, problems, pictures)
    fingerprint = sha256_json(inputs)
    path = Path(config.data.cache) / fingerprint[:16]
    if path.exists():
        manifest = read_json(path / "manifest.json", "the dataset's manifest (remove this folder to build it again)")
        return DistillationDataset(path, manifest), True
    rows, manifest = _make_rows(config, tokenizer, problems, pictures)
    manifest = {"fingerprint": fingerprint, "made_of": inputs, **manifest}
    import datasets

    features = datasets.Features(
        pid=datasets.Value("string"),
        arm=datasets.Value("string"),
        source=datasets.Value("string"),
        tokens=datasets.List(datasets.Value("int32")),
        prompt_length=datasets.Value("int32"),
        behind_picture=datasets.Value("int32"),
    )
    try:
        with atomic_directory(path) as beside:
            datasets.disable_progress_bars()
            datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(beside / "rows"))
            write_json(beside / "manifest.json", manifest)
    except OSError:
        # Another process finished the same dataset first; the fingerprint says that it is the same.
        if not (path / "manifest.json").exists():
            raise
    return DistillationDataset(path, manifest), False


def _fingerprint_inputs(config, tokenizer: Any, problems: ProblemSet, pictures: ImageStore | None) -> dict[str, Any]:
    """All that decides the rows, and nothing else: the same inputs make the same dataset."""
    files = [path for path in config.data.teacher if path != "sample"]
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"config.data.teacher: {path} not found; name files of recorded replies, or ('sample',)")
    for path in config.data.traces:
        if not Path(path).is_file():
            raise UserError(f"config.data.traces: {path} not found; python -m sqa_jax.agent --traces makes it")
    return {
        "format": FORMAT,
        "version": sqa_jax.__version__,
        "recipe": config.recipe.to_dict(),
        "train_split": config.data.train_split,
        "train_limit": config.data.train_limit,
        "subjects": sorted(config.data.subjects),
        "seed": config.seed if 0 < config.data.train_limit < len(problems.split(config.data.train_split)) else None,
        "problems": problems.fingerprint,
        "teacher": [sha256_file(path) for path in files] + ["sample"] * ("sample" in config.data.teacher),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **({} if pictures is None else {"pictures": pictures.fingerprint}),
        **({"traces": [*map(sha256_file, traces), config.agent.context]} if (traces := config.data.traces) else {}),
    }


def training_problems(config, problems: ProblemSet) -> Sequence[Problem]:
    """The training split, of `config.data.subjects`; or `train_limit` of them drawn with the seed, in split order.

    Raises:
      UserError: there is no such subject.
    """
    chosen = problems.split(config.data.train_split)
    if subjects := set(config.data.subjects):
        known = {problem.subject for problem in chosen}
        if subjects - known:
            raise UserError(
                f"config.data.subjects: {', '.join(sorted(subjects - known))} not in split {config.data.train_split!r}; "
                f"it has {', '.join(sorted(known))}"
            )
        chosen = [problem for problem in chosen if problem.subject in subjects]
    limit = config.data.train_limit
    if 0 < limit < len(chosen):
        kept = np.random.default_rng(config.seed).choice(len(chosen), limit, replace=False)
        chosen = [chosen[k] for k in sorted(kept)]
    return chosen


def _rows_of_traces(config, tokenizer: Any, chosen: Sequence[Problem]) -> Iterator[_Row | Unusable]:
    traces = read_traces(config.data.traces, {problem.pid: problem for problem in chosen})
    yield from (Unusable(problem.pid, "no trace") for problem in chosen if problem.pid not in traces)
    for problem, source, row in trace_rows(tokenizer, config.recipe, config.agent.context, chosen, traces):
        yield problem.pid, source, row


def _rows_of_recipe(
    config, tokenizer: Any, chosen: Sequence[Problem], problems: ProblemSet, pictures: ImageStore | None
) -> Iterator[_Row | Unusable]:
    by_pid = records_by_pid(config_records(config, problems))
    encoder, recipe = encoder_for(config, tokenizer, pictures), config.recipe
    blind = {} if pictures is None else pictures.failed
    yield from (Unusable(problem.pid, blind[problem.pid]) for problem in chosen if problem.pid in blind)
    seeing = [problem for problem in chosen if problem.pid not in blind]
    texts: set[str] = set()  # plain texts so far: many questions share a lecture, which is learned once
    for start in range(0, len(seeing), _BATCH):
        part = seeing[start : start + _BATCH]
        made = [one for problem in part for one in examples(problem, by_pid.get(problem.pid, {}), recipe)]
        yield from (one for one in made if isinstance(one, Unusable))
        usable = [one for one in made if not isinstance(one, Unusable)]
        for example, row in _encode(encoder, usable, recipe.max_target, texts):
            yield example.problem.pid, example.source, row


def _make_rows(
    config, tokenizer: Any, problems: ProblemSet, pictures: ImageStore | None
) -> tuple[dict[str, list], dict[str, Any]]:
    arm, chosen = "tools" if config.data.traces else config.recipe.arm, training_problems(config, problems)
    if config.data.traces:
        made = _rows_of_traces(config, tokenizer, chosen)
    else:
        made = _rows_of_recipe(config, tokenizer, chosen, problems, pictures)
    rows: dict[str, list] = {name: [] for name in ("pid", "arm", "source", "tokens", "prompt_length", "behind_picture")}
    dropped: dict[str, list[str]] = collections.defaultdict(list)
    shortened: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for one in made:
        if isinstance(one, Unusable):
            dropped[one.reason].append(one.pid)
            continue
        pid, source, row = one
        if not row.fits:
            dropped["question and choices longer than max_prompt"].append(pid)
        elif len(row.tokens) - row.prompt_length > config.recipe.max_target:
            dropped["target longer than max_target"].append(pid)
        else:
            values = (pid, arm, source, row.tokens, row.prompt_length, row.behind_picture)
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
            for part, count in row.shortened.items():
                shortened[part].append((pid, count))
    if not rows["pid"]:
        reasons = "; ".join(f"{reason}: {len(pids)}" for reason, pids in dropped.items()) or "the split is empty"
        raise UserError(
            f"split {config.data.train_split!r} of {problems.name} makes no training row for arm {arm} ({reasons})"
        )
    return rows, {
        "arm": arm,
        "questions": len(chosen),
        "rows": len(rows["pid"]),
        "rows_by_source": dict(collections.Counter(rows["source"])),
        "tokens": _percentiles([len(t) for t in rows["tokens"]]),
        "target_tokens": _percentiles([len(t) - n for t, n in zip(rows["tokens"], rows["prompt_length"], strict=True)]),
        "shortened": {
            part: {"rows": len(cuts), "tokens": sum(n for _, n in cuts), "pids": [pid for pid, _ in cuts[:_NAMED]]}
            for part, cuts in shortened.items()
        },
        "dropped": {reason: {"rows": len(pids), "pids": pids[:_NAMED]} for reason, pids in dropped.items() if pids},
        **({} if pictures is None else {"pictures": _of_pictures(pictures)}),
    }


def _of_pictures(pictures: ImageStore) -> dict[str, Any]:
    """How many questions have pictures, how many there are, and how large."""
    features = np.diff(pictures.firsts)
    return {
        "questions": len(pictures.number_of),
        "distinct": len(features),
        "unusable": pictures.failures,
        "pieces": f"pictures-{pictures.pieces_fingerprint[:16]}",
        "bytes": pictures.pieces.nbytes,
        "features": _percentiles(features.tolist()) if len(features) else {},
    }


def _encode(
    encoder: Encoder, made: Sequence[Example], max_target: int, texts: set[str]
) -> Iterator[tuple[Example, Encoded]]:
    """Each example with its ids; a plain text, where it is new to `texts`, in pieces of `max_target` tokens."""
    asked = [example for example in made if example.format is not None]
    yield from zip(
        asked,
        encoder.encode([e.problem for e in asked], [e.format for e in asked], [e.target for e in asked]),
        strict=True,
    )
    plain = {e.target: e for e in made if e.format is None and e.target not in texts}
    texts.update(plain)
    for example, pieces in zip(plain.values(), encoder.encode_texts(list(plain), max_target), strict=True):
        yield from ((example, piece) for piece in pieces)


def _percentiles(lengths: list[int]) -> dict[str, float]:
    marks = np.percentile(lengths, [0, 50, 90, 99, 100])
    return {
        "total": int(np.sum(lengths)),
        **dict(zip(("min", "p50", "p90", "p99", "max"), marks.round(1).tolist(), strict=True)),
    }
