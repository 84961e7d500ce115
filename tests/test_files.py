"""Files are whole or not there, and what the disk says reaches the user in one line."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest

from sqa_jax.errors import UserError
from sqa_jax.files import atomic_directory, atomic_write, disk_errors, read_jsonl


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("before")
    with pytest.raises(RuntimeError), atomic_write(file) as out:
        out.write("half")
        raise RuntimeError
    assert file.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with atomic_write(file) as out:
        out.write("after")
    umask = os.umask(0)
    os.umask(umask)
    assert file.read_text() == "after" and stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_a_failed_directory_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as beside:
        (beside / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "d") as beside:
        (beside / "x").write_text("whole")
    assert (tmp_path / "d" / "x").read_text() == "whole"
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "d"):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
    ],
)
def test_what_the_disk_says_is_one_line(error, words):
    with pytest.raises(UserError, match=words), disk_errors("/some/place"):
        raise error


def test_other_errors_are_not_the_disks():
    with pytest.raises(ValueError, match="shape"), disk_errors("/some/place"):
        raise ValueError("shape")


def test_a_text_may_hold_any_character_of_a_line_end(tmp_path):
    """U+2028 and its like stand in replies of teachers; only a newline ends a row."""
    texts = ["a\u2028b", "c\u0085d\u2029", "e\x0bf\x0c\x1c"]
    with atomic_write(tmp_path / "rows.jsonl") as file:
        file.writelines(json.dumps({"raw": text}, ensure_ascii=False) + "\n" for text in texts)
    assert [row["raw"] for row in read_jsonl(tmp_path / "rows.jsonl", "rows")] == texts
