"""What the README shows is what the code makes."""

from __future__ import annotations

import re
import textwrap

import pytest

from configs.quickstart import get_config
from sqa_jax.batches.config_data import config_records, load_config_problems
from sqa_jax.data.teacher_records import records_by_pid
from sqa_jax.prompts.formats import sections
from sqa_jax.prompts.recipes import ARMS, examples
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = {"1": "22", "2": "830"}  # number in the README → pid in the sample


@pytest.fixture(scope="module")
def sample():
    config = get_config()
    config.data.teacher, config.recipe.format = ("sample",), "QCM-AE"
    problems = load_config_problems(config)
    return config, problems.all(), records_by_pid(config_records(config, problems))


def block_of(arm: str) -> str:
    """The fenced block behind the bold name of an arm."""
    match = re.search(rf"\*\*`{arm}`\*\*.*?```\n(.*?)```", README, re.DOTALL)
    assert match, f"README has no example of {arm}"
    return match[1]


def numbered(number: str, text: str) -> str:
    return textwrap.indent(text, "   ").replace("   ", f"{number}  ", 1) + "\n"


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "golden_lecture"])
def test_arms_are_shown_as_they_are_rendered(sample, arm):
    config, problems, by_pid = sample
    config.recipe.arm = arm
    expected = ""
    for number, pid in SHOWN.items():
        for example in examples(problems[pid], by_pid[pid], config.recipe):
            text = example.target
            if arm == "teacher_lecture":
                text = f"Lecture: {problems[pid].lecture}\n→ {text}"
            expected += numbered(number, text)
    assert block_of(arm) == expected


def test_the_questions_are_shown_as_they_are_asked(sample):
    config, problems, by_pid = sample
    config.recipe.arm = "golden"
    for number, pid in SHOWN.items():
        (example,) = examples(problems[pid], by_pid[pid], config.recipe)
        asked = "\n".join(label + text for _, label, text in sections(problems[pid], example.format, True))
        assert numbered(number, asked) in README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"(?:configs|docs|launch|sqa_jax|tests)/[\w/.]+\.(?:py|sh|svg)", text))
    names |= set(re.findall(r"`((?:sqa_jax|tests)/[\w/]+/)`", text))
    assert names and not [name for name in names if not (ROOT / name).exists()]


def test_every_name_of_the_contributing_page_is_in_its_file():
    """ "NAME of FILE" and "NAME in FILE": the constants that a contributor is sent to."""
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    pairs = re.findall(r"`([A-Z_]+)` (?:of|in) `((?:sqa_jax|tests)/[\w/]+\.py)`", text)
    assert len(pairs) >= 5
    for name, file in pairs:
        assert re.search(rf"^{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (name, file)
