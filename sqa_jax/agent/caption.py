"""The caption tool: describes a question's image by the caption that the data holds."""

from __future__ import annotations

from collections.abc import Sequence

from sqa_jax.agent.tools import Request, Tool
from sqa_jax.data.sources import ProblemSet
from sqa_jax.prompts.tool_calls import ToolSpec


def tool(config, problem_set: ProblemSet) -> Tool:
    """The tool `describe_image`."""

    def run(requests: Sequence[Request]) -> list[str]:
        return [request.problem.caption if request.problem.image else "" for request in requests]

    return Tool(ToolSpec("describe_image", "says what the question's image shows"), run)
