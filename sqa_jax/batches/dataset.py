"""Pre-tokenized distillation datasets: Arrow rows beside a manifest, one folder per fingerprint of their inputs."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

import sqa_jax
from sqa_jax.batches.training_rows import CollectedRows, collect_rows, row_source
from sqa_jax.checkpoints.tokenizer import fingerprint as tokenizer_fingerprint
from sqa_jax.data.images import ImageStore
from sqa_jax.data.sources import ProblemSet
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, read_json, sha256_file, sha256_json, write_json
from sqa_jax.prompts.recipes import check_recipe

FORMAT = 3  # raised when the same inputs would make other rows
_MAX_PIDS = 50  # pids that the manifest lists for each reason


class Columns(NamedTuple):
    """The rows of a dataset.

    Attributes:
      tokens: ids (int32) of each.
      prompt_lengths: how many of them are prompt.
      image_ends: how many of them end with the prompt's image; 0 where there is none.
      pids: the question of each.
    """

    tokens: list[Int[np.ndarray, " _"]]
    prompt_lengths: Int[np.ndarray, " N"]
    image_ends: Int[np.ndarray, " N"]
    pids: list[str]


class DistillationDataset(NamedTuple):
    """A built dataset: where it is, and its manifest. Rows are loaded by `columns`."""

    path: Path
    manifest: dict[str, Any]

    def columns(self) -> Columns:
        """The columns that packing needs.

        Raises:
          UserError: the Arrow files are damaged.
        """
        import datasets
        import datasets.exceptions

        try:
            rows = datasets.load_from_disk(str(self.path / "rows")).with_format("numpy")
            tokens, pids = rows["tokens"][:], rows["pid"][:]
            prompt_lengths, image_ends = rows["prompt_length"][:], rows["behind_picture"][:]
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(
                f"{self.path}: damaged ({type(error).__name__}); remove this folder and run again"
            ) from None
        if len(tokens) != self.manifest["rows"]:
            raise UserError(
                f"{self.path}: holds {len(tokens)} rows, its manifest says {self.manifest['rows']}; remove this folder and run again"
            )
        tokens = [np.asarray(t, np.int32) for t in tokens]
        return Columns(tokens, np.asarray(prompt_lengths), np.asarray(image_ends), [str(p) for p in pids])


def build_or_reuse(
    config, tokenizer: Any, problems: ProblemSet, images: ImageStore | None = None
) -> tuple[DistillationDataset, bool]:
    """The dataset of a configuration's training split, and whether it existed already.

    A dataset is written to a temporary folder and renamed when complete, so one that exists is complete.

    Args:
      images: of the training questions, for a vision-language model.

    Raises:
      UserError: the configuration, the data or the disk does not allow it.
    """
    check_recipe(config.recipe, bool(config.data.teacher))
    inputs = _fingerprint_inputs(config, tokenizer, problems, images)
    fingerprint = sha256_json(inputs)
    path = Path(config.data.cache) / fingerprint[:16]
    if path.exists():
        manifest = read_json(path / "manifest.json", "the dataset's manifest (remove this folder to build it again)")
        return DistillationDataset(path, manifest), True
    source = row_source(config, tokenizer, problems, images)
    collected = collect_rows(source.rows, config.recipe.max_target)
    if not collected.rows:
        reasons = "; ".join(f"{reason}: {len(pids)}" for reason, pids in collected.dropped.items())
        raise UserError(
            f"split {config.data.train_split!r} of {problems.name} makes no training row for arm {source.arm} "
            f"({reasons or 'the split is empty'})"
        )
    manifest = {
        "fingerprint": fingerprint,
        "made_of": inputs,
        "arm": source.arm,
        "questions": len(source.questions),
        **_row_statistics(collected),
        **({} if images is None else {"pictures": _image_statistics(images)}),
    }
    try:
        with atomic_directory(path) as beside:
            _save_rows(collected, source.arm, beside / "rows")
            write_json(beside / "manifest.json", manifest)
    except OSError:
        # Another process finished the same dataset first; the fingerprint says that it is the same.
        if not (path / "manifest.json").exists():
            raise
    return DistillationDataset(path, manifest), False


def _save_rows(collected: CollectedRows, arm: str, path: Path) -> None:
    import datasets

    rows, encoded = collected.rows, [row.encoded for row in collected.rows]
    columns = {
        "pid": (datasets.Value("string"), [row.pid for row in rows]),
        "arm": (datasets.Value("string"), [arm] * len(rows)),
        "source": (datasets.Value("string"), [row.source for row in rows]),
        "tokens": (datasets.List(datasets.Value("int32")), [row.tokens for row in encoded]),
        "prompt_length": (datasets.Value("int32"), [row.prompt_length for row in encoded]),
        "behind_picture": (datasets.Value("int32"), [row.image_end for row in encoded]),
    }
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)
    table.save_to_disk(str(path))


def _fingerprint_inputs(config, tokenizer: Any, problems: ProblemSet, images: ImageStore | None) -> dict[str, Any]:
    """All inputs that determine the rows, and nothing else: the same inputs make the same dataset."""
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
        **({} if images is None else {"pictures": images.fingerprint}),
        **({"traces": [*map(sha256_file, traces), config.agent.context]} if (traces := config.data.traces) else {}),
    }


def _row_statistics(collected: CollectedRows) -> dict[str, Any]:
    """What the manifest says of the rows, and of those that were dropped or truncated."""
    encoded = [row.encoded for row in collected.rows]
    return {
        "rows": len(encoded),
        "rows_by_source": dict(collections.Counter(row.source for row in collected.rows)),
        "tokens": _percentiles([len(row.tokens) for row in encoded]),
        "target_tokens": _percentiles([len(row.tokens) - row.prompt_length for row in encoded]),
        "shortened": {
            part: {"rows": len(cuts), "tokens": sum(n for _, n in cuts), "pids": [pid for pid, _ in cuts[:_MAX_PIDS]]}
            for part, cuts in collected.truncated.items()
        },
        "dropped": {
            reason: {"rows": len(pids), "pids": pids[:_MAX_PIDS]} for reason, pids in collected.dropped.items()
        },
    }


def _image_statistics(images: ImageStore) -> dict[str, Any]:
    """How many questions have images, how many distinct ones there are, and their sizes."""
    features = np.diff(images.feature_offsets)
    return {
        "questions": len(images.image_index),
        "distinct": len(features),
        "unusable": images.failures,
        "pieces": f"pictures-{images.pieces_fingerprint[:16]}",
        "bytes": images.pieces.nbytes,
        "features": _percentiles(features.tolist()) if len(features) else {},
    }


def _percentiles(lengths: list[int]) -> dict[str, int | float]:
    marks = np.percentile(lengths, [0, 50, 90, 99, 100])
    return {
        "total": int(np.sum(lengths)),
        **dict(zip(("min", "p50", "p90", "p99", "max"), marks.round(1).tolist(), strict=True)),
    }
