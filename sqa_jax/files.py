"""Files that are either whole or not there: write beside, flush, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqa_jax.errors import UserError


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns a full disk or a missing permission met while writing `path` into a `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # Checkpoints are written by a library that reports a full disk as a ValueError of its own.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise UserError(f"{path}: the disk is full; free some space or choose another place") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose a place you may write to") from error
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a temporary file beside `path` and renames it over `path` when the block succeeds.

    After a crash, a full disk or an exception, `path` holds what it held before.

    Raises:
      UserError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            # mkstemp makes the file private; what replaces it should be as readable as any new file.
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(descriptor, 0o666 & ~umask)
            with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a new directory beside `path` that becomes `path` when the block succeeds.

    Raises:
      UserError: the disk is full, the place cannot be written, or `path` exists already.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: exists already; remove it or choose another place")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left beside `path`; a day old, so that nobody is still writing it."""
    for left in path.parent.glob(f".{path.name}.*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)


def read_json(path: str | Path, what: str) -> Any:
    """Reads a JSON file; `what` says in the error what the file is for.

    Raises:
      UserError: the file is missing, cut off or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; it should hold {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; it should be a file that holds {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); the file is damaged or cut off, fetch {what} again"
        ) from None


def read_jsonl(path: str | Path, what: str) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line, skipping blank lines.

    Raises:
      UserError: the file is missing, or a line is not a JSON object (the line is named).
    """
    try:
        # Not splitlines(): a text may hold U+2028 and other characters that it takes for line ends.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; it should hold {what}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path}: not a text file; it should hold {what}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; mend or remove this line of {what}")
        rows.append(row)
    return rows


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
