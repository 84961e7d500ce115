"""The caption tool: says what a question's image shows, as the data's captions have it."""

from __future__ import annotations

from collections.abc import Sequence

from sqa_jax.agent.tools import Request, Tool
from sqa_jax.data.sources import ProblemSet
from sqa_jax.prompts.tool_dialogue import ToolSpec


def tool(config, problems: ProblemSet) -> Tool:
    def run(requests: Sequence[Request]) -> list[str]:
        return [request.problem.caption if request.problem.image else "" for request in requests]

    return Tool(ToolSpec("describe_image", "says what the question's image shows"), run)
