"""Replies of a *simulated* teacher, wrong at a stated rate. They are generated here; no model was queried.

They have the format of a real teacher's replies, so that all that parses replies can be run and tested without one:
free text that argues to an answer (setting QTCH), and JSON with answer and solution (QTCHL), some
empty and some malformed. Options are numbered from 0.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

MODEL = "simulated-teacher"


def reply(rng: random.Random, row: Mapping[str, Any], setting: str, error_rate: float) -> str:
    """One reply to a question in ScienceQA's row form."""
    luck = rng.random()
    if luck < 0.02:
        return ""
    choices, answer = row["choices"], row["answer"]
    solution = row["solution"]
    if rng.random() < error_rate:
        answer = rng.choice([k for k in range(len(choices)) if k != answer])
        solution = f"{row['lecture'].split('. ')[0].rstrip('.')}. This fits best with: {choices[answer]}."
    if setting == "QTCHL":
        if luck < 0.04:
            return f'```json\n{{\n "answer": {answer},\n "sol'  # cut off
        body = {"answer": str(answer) if rng.random() < 0.3 else answer, "solution": solution}
        return f"```json\n{json.dumps(body, indent=1, ensure_ascii=False)}\n```"
    if luck < 0.04:
        return "Please provide the image. I need to see it to answer.\n"
    styles = [
        f"The answer is **({answer}) {choices[answer]}**.\n\nHere's why:\n\n* {row['lecture']}\n* {solution}\n",
        f"({answer}) {choices[answer]}\n\n{solution}",
        f"{row['lecture']} {solution}\n\nTherefore, the correct answer is **({answer}) {choices[answer]}**.",
        f"Let's think step by step. {solution} So the answer is ({answer}).",
    ]
    return rng.choice(styles)
