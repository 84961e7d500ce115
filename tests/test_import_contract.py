"""The import contract holds, and its checker finds what breaks it."""

from __future__ import annotations

import pytest

from tests.import_contract import draw, violations

# A package of three layers, the middle one with layers of its own.
FILES = {
    "top.py": "from tiny.middle.upper import a\n",
    "middle/__init__.py": "",
    "middle/upper.py": "from tiny.middle.lower import thing\nimport tiny.bottom\na = thing\n",
    "middle/lower/__init__.py": "",
    "middle/lower/thing.py": "",
    "bottom.py": "",
}
LAYERS = (("top",), ("middle",), ("bottom",))
INNER = {"middle": (("upper",), ("lower",))}


def test_imports_of_the_package_point_down():
    assert violations() == []


@pytest.fixture
def tiny(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path / "tiny", LAYERS, INNER) == []
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "bottom.py",
            "def f():\n    from tiny.middle import upper\n",
            "bottom.py:2: bottom imports middle, which is not",
        ),
        (
            "bottom.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tiny.top\n",
            "bottom.py:3: bottom",
        ),
        ("middle/lower/thing.py", "from tiny.middle import upper\n", "thing.py:1: lower imports upper, which is not"),
        ("aside.py", "", "aside is in no layer"),
        ("middle/aside.py", "", "aside is in no layer"),
        ("bottom.py", "import tiny.top\n", "cycle of packages: bottom → "),
        ("middle/lower/other.py", "import tiny.middle.upper\n", "cycle of packages inside middle: lower → upper"),
        ("middle/lower/thing.py", "import tiny.middle.lower.other\n", ""),
    ],
)
def test_an_import_that_breaks_the_contract_is_found(tiny, file, text, message):
    (tiny / file).write_text(text)
    if not message:  # neighbours in one package may import each other, but not in a cycle
        (tiny / "middle/lower/other.py").write_text("from tiny.middle.lower import thing\n")
        message = "cycle of modules: middle.lower.other → middle.lower.thing → middle.lower.other"
    assert any(message in line for line in violations(tiny, LAYERS, INNER))


def test_the_layers_are_drawn_from_the_code(tmp_path):
    draw(tmp_path / "layers.svg")
    drawn = (tmp_path / "layers.svg").read_text()
    assert drawn.startswith("<?xml") and ">student_config<" in drawn
    draw(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn, "the same code, the same picture"
