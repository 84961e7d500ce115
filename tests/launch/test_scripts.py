"""The launch scripts refuse what they cannot do, in one line."""

from __future__ import annotations

import subprocess

import pytest


def run(*arguments):
    return subprocess.run(["bash", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["launch/quickstart.sh", "--dta", "x"], "unknown argument --dta"),
        (["launch/quickstart.sh", "--data", "/no/such/place"], "/no/such/place: no such directory"),
        (["launch/quickstart.sh", "--data"], "--data needs a directory"),
    ],
)
def test_quickstart_refuses(arguments, words):
    result = run(*arguments)
    assert result.returncode != 0 and words in result.stderr


def test_quickstart_explains_itself():
    result = run("launch/quickstart.sh", "--help")
    assert result.returncode == 0 and "--data DIR" in result.stdout and "#" not in result.stdout


def test_scripts_parse():
    for script in ("quickstart.sh", "test.sh", "fetch_student.sh", "environment.sh"):
        assert run("-n", f"launch/{script}").returncode == 0
