"""The retrieval tool: a lecture for a query, the question's gold lecture (oracle) or the best match of BM25.

The index holds the distinct lectures of the training split only. For a test question it may return a wrong lecture,
and the gold lecture may be missing from it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sqa_jax.agent.tools import Request, Tool
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.errors import UserError
from sqa_jax.prompts.tool_calls import ToolSpec

KINDS = ("oracle", "bm25")


class Index:
    """BM25 over lectures (Robertson & Zaragoza 2009, Foundations and Trends in IR 3:333), by `bm25s`.

    Attributes:
      lectures: the documents, in the order in which they first occur.
    """

    def __init__(self, problems: Sequence[Problem]):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self.lectures = list(dict.fromkeys(p.lecture.strip() for p in problems if p.lecture.strip()))
        if not self.lectures:
            raise UserError("config.agent.retrieval is 'bm25', and the training split has no lectures; use oracle")
        self._index = bm25s.BM25()
        self._index.index(self._tokens(self.lectures), show_progress=False)

    @staticmethod
    def _tokens(texts: Sequence[str]):
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", show_progress=False)

    def search(self, queries: Sequence[str], count: int = 1) -> list[list[str]]:
        """The best `count` lectures for each query, best first; fewer where fewer share a word with it."""
        count = min(count, len(self.lectures))
        found, scores = self._index.retrieve(self._tokens(queries), k=count, show_progress=False)
        return [
            [self.lectures[k] for k, score in zip(indices, row_scores, strict=True) if score > 0]
            for indices, row_scores in zip(found, scores, strict=True)
        ]


def query_of(problem: Problem) -> str:
    """The query where a policy chooses among whole actions: the question and its choices."""
    return " ".join([problem.question, *problem.choices])


def recall(index: Index, problems: Sequence[Problem], depths: Sequence[int] = (1, 3, 5, 10)) -> dict[str, float | int]:
    """Recall@k: how often a question's gold lecture is among the first k, in percent of the questions that have one.

    Returns:
      {"n", "in_index": percent whose lecture is in the index at all, "recall@k"}.
    """
    asked = [problem for problem in problems if problem.lecture.strip()]
    if not asked:
        return {"n": 0}
    known = set(index.lectures)
    ranked = index.search([query_of(problem) for problem in asked], max(depths))
    gold = [problem.lecture.strip() for problem in asked]
    shares = {f"recall@{k}": sum(lecture in row[:k] for lecture, row in zip(gold, ranked, strict=True)) for k in depths}
    counts = {"in_index": sum(lecture in known for lecture in gold), **shares}
    return {"n": len(asked), **{name: round(100 * count / len(asked), 2) for name, count in counts.items()}}


def tool(config, problem_set: ProblemSet) -> Tool:
    """The tool `retrieve`.

    Raises:
      UserError: `config.agent.retrieval` is not known.
    """
    kind = config.agent.retrieval
    if kind not in KINDS:
        raise UserError(f"config.agent.retrieval is {kind!r}; choose one of {', '.join(KINDS)}")
    index = Index(problem_set.split(config.data.train_split)) if kind == "bm25" else None

    def run(requests: Sequence[Request]) -> list[str]:
        if index is None:
            return [request.problem.lecture.strip() for request in requests]
        return [next(iter(found), "") for found in index.search([request.argument for request in requests])]

    schema = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    return Tool(ToolSpec("retrieve", "finds a lecture about the words given", schema), run, query_of)
