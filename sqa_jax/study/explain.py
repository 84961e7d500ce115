"""Generated explanations against the data's own: what was explained, and by whom, for the text metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.files import read_jsonl
from sqa_jax.metrics.explanations import METRICS, explanation_of, explanation_scores, reference_of
from sqa_jax.study.execute import EXPLANATIONS
from sqa_jax.study.matrix import Run, student_name


def explanations(
    config,
    runs: Sequence[Run],
    records: Sequence[Mapping[str, Any]],
    root: Path,
    problems: ProblemSet,
    existing: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Scores of every run's generated explanations and of as many of every existing model's solutions.

    The reference is lecture and solution, as in the earlier study.

    Returns:
      {"rows": [{"system", "n", "scores": {metric: mean}}], "note": what was compared, what was not, and why}.
    """
    everything = problems.all()
    told: list[tuple[str, list[Problem], list[str]]] = []
    for run, record in zip(runs, records, strict=True):
        file = run.folder(root) / "eval" / EXPLANATIONS / "predictions.jsonl"
        if record["status"] == "finished" and run.seed == config.study.seeds[0] and file.exists():
            rows = read_jsonl(file, "generated explanations")
            name = f"{student_name(run.student)}, {run.arm}, {run.adapter}"
            told.append((name, [everything[row["pid"]] for row in rows], [explanation_of(row["text"]) for row in rows]))
    for model in existing:
        own = [record for record in model["records"] if record.solution][: config.study.explanations]
        if own:
            name = f"{model['system']}, {model['setting']}, {model['form']}"
            told.append((name, [everything[record.pid] for record in own], [record.solution for record in own]))
    made, notes = [], {}
    for name, asked, texts in told:
        references = [reference_of(problem) for problem in asked]
        kept = [k for k, reference in enumerate(references) if reference]
        scores, notes = explanation_scores([references[k] for k in kept], [texts[k] for k in kept])
        means = {metric: sum(scores[metric]) / len(kept) if metric in scores and kept else None for metric in METRICS}
        made.append({"system": name, "n": len(kept), "scores": means})
    note = "Against lecture and solution: BLEU, ROUGE-L (F1), METEOR, and the cosine of all-MiniLM-L6-v2 embeddings."
    if not made:
        note = "No explanation was generated: set config.study.explanations to a number of test questions."
    return {"rows": made, "note": " ".join([note, *(f"{text}." for text in dict.fromkeys(notes.values()))])}
