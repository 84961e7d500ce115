"""Text metrics of generated explanations: every run's and every existing model's, against the data's solutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.files import read_jsonl
from sqa_jax.metrics.explanations import METRICS, explanation_of, explanation_scores, reference_of
from sqa_jax.study.execute import EXPLANATIONS
from sqa_jax.study.matrix import StudyRun, student_name


def explanations(
    config,
    runs: Sequence[StudyRun],
    records: Sequence[Mapping[str, Any]],
    root: Path,
    problems: ProblemSet,
    existing: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Scores of every run's generated explanations, and of as many solutions of every existing model.

    The reference is lecture and solution, as in the earlier study.

    Returns:
      {"rows": [{"system", "n", "scores": {metric: mean}}], "note": the metrics, and which are missing and why}.
    """
    rows, notes = [], {}
    for name, explained, texts in _generated(config, runs, records, root, problems, existing):
        references = [reference_of(problem) for problem in explained]
        kept = [k for k, reference in enumerate(references) if reference]
        scores, notes = explanation_scores([references[k] for k in kept], [texts[k] for k in kept])
        means = {metric: sum(scores[metric]) / len(kept) if metric in scores and kept else None for metric in METRICS}
        rows.append({"system": name, "n": len(kept), "scores": means})
    note = "Against lecture and solution: BLEU, ROUGE-L (F1), METEOR, and the cosine of all-MiniLM-L6-v2 embeddings."
    if not rows:
        note = "No explanation was generated: set config.study.explanations to a number of test questions."
    return {"rows": rows, "note": " ".join([note, *(f"{text}." for text in dict.fromkeys(notes.values()))])}


def _generated(
    config,
    runs: Sequence[StudyRun],
    records: Sequence[Mapping[str, Any]],
    root: Path,
    problems: ProblemSet,
    existing: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, list[Problem], list[str]]]:
    """(system, questions, explanations) of each run of the first seed and of each existing model."""
    by_pid = problems.all()
    for run, record in zip(runs, records, strict=True):
        file = run.folder(root) / "eval" / EXPLANATIONS / "predictions.jsonl"
        if record["status"] == "finished" and run.seed == config.study.seeds[0] and file.exists():
            rows = read_jsonl(file, "generated explanations")
            name = f"{student_name(run.student)}, {run.arm}, {run.adapter}"
            yield name, [by_pid[row["pid"]] for row in rows], [explanation_of(row["text"]) for row in rows]
    for model in existing:
        explained = [record for record in model["records"] if record.solution][: config.study.explanations]
        if explained:
            name = f"{model['system']}, {model['setting']}, {model['form']}"
            yield name, [by_pid[record.pid] for record in explained], [record.solution for record in explained]
