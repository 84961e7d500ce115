"""What tests of exports read from a model card, and the answers that it should give."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import yaml

from sqa_jax.batches.config_data import encoder_for, load_config_problems
from sqa_jax.config import default
from sqa_jax.inference.generate import Generator
from sqa_jax.models.api import model_class
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.prompts.recipes import arm_format


def card_of(out: Path) -> tuple[dict, str, str]:
    """Front matter, text, and the Python snippet of a model card."""
    _, front, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return yaml.safe_load(front), text, code


def run_snippet(code: str) -> tuple[str, dict[str, Any]]:
    """What the code prints, and its names. Needs PyTorch."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), names)
    return out.getvalue(), names


def snippet_prompt(code: str) -> tuple[list[str], list[int]]:
    """The parts of the snippet's prompt and their token ids, by its lines that need no PyTorch."""
    lines = code[code.index("from transformers") : code.index("reply = ")].replace(
        'return_tensors="pt"', 'return_tensors="np"'
    )
    lines = re.sub(r"^model = .*\n", "", lines, flags=re.MULTILINE)
    names = run_snippet(lines)[1]
    return names["prompt"], names["inputs"]["input_ids"][0].tolist()


def card_prompt(student, config) -> list[int]:
    """The token ids of the prompt in a model card's snippet, as training makes them."""
    problem = load_config_problems(config).split("test")[0]
    (prompt,) = encoder_for(config, student.tokenizer).encode([problem], [arm_format(config.recipe)])
    return prompt.tokens


def card_reply(student, settings, tree, config) -> str:
    """What our generator replies to it, as the snippet prints it."""
    mesh, module = make_mesh(default().mesh, jax.devices()[:1]), model_class(student.config)(student.config)
    generator = Generator(settings, module, mesh, student.eos_ids, config.eval.max_new_tokens, 1)
    ((_, ids),) = generator(tree, student.params, [card_prompt(student, config)])
    return student.tokenizer.decode(ids, skip_special_tokens=True) + "\n"
