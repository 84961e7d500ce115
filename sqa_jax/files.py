"""Files that are either whole or not there: write beside, flush, rename. On a disk or, where it says so, in a bucket."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sqa_jax.bucket import BucketLog, bucket_errors, bucket_path, in_bucket
from sqa_jax.errors import UserError


def as_path(path: str | Path) -> Path:
    """A path on this machine's disk, or for gs://bucket/… an `epath.Path`: the same methods work on both.

    Raises:
      UserError: it is in another kind of store, or what talks to buckets is not installed.
    """
    if in_bucket(path):
        return bucket_path(path)
    return local_path(path, "gs:// is the only store that is known, and all else")


def local_path(path: str | Path, what: str) -> Path:
    """A path on this machine's disk.

    Args:
      what: must be there, for the error.

    Raises:
      UserError: it is elsewhere.
    """
    if "://" in str(path):
        raise UserError(f"{path}: {what} must be on this machine's disk; name a place there")
    return Path(path)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns a full disk, a missing permission or a bucket's refusal met while writing `path` into a `UserError`."""
    try:
        with bucket_errors(path):
            yield
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # Checkpoints are written by a library that reports a full disk as a ValueError of its own.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise UserError(f"{path}: the disk is full; free some space or choose another place") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{path}: cannot be written ({os.strerror(number)}); choose a place you may write to"
            ) from error
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a temporary file beside `path` and renames it over `path` when the block succeeds.

    After a crash, a full disk or an exception, `path` holds what it held before. In a bucket, what is written is kept
    in memory and uploaded at once.

    Raises:
      UserError: the disk is full or the place cannot be written.
    """
    path = as_path(path)
    if in_bucket(path):
        content = io.BytesIO()
        file = content if "b" in mode else io.TextIOWrapper(content, "utf-8", write_through=True)
        with disk_errors(path):
            yield file
            path.write_bytes(content.getvalue())
        return
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
      UserError: the disk is full, the place cannot be written or is a bucket, or `path` exists already.
    """
    path = local_path(path, "what is made as a whole directory")
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


def open_log(path: str | Path) -> IO[str] | BucketLog:
    """Opens a file that grows by lines, for `write`, `flush` and `close`.

    On a disk each line is there when `write` returns. In a bucket lines arrive some seconds later, and all of them when
    `flush` or `close` returns.
    """
    path = as_path(path)
    return BucketLog(path) if in_bucket(path) else open(path, "a", encoding="utf-8", buffering=1)


def archive(folder: str | Path, target: str | Path) -> None:
    """Renames a folder of files. In a bucket nothing is removed before all is copied, and `folder` may stay half empty."""
    folder, target = as_path(folder), as_path(target)
    with disk_errors(folder):
        if not in_bucket(folder):
            os.replace(folder, target)
            return
        files = sorted(folder.iterdir())
        for file in files:
            (target / file.name).write_bytes(file.read_bytes())
        for file in files:
            file.unlink()


def read_json(path: str | Path, what: str) -> Any:
    """Reads a JSON file; `what` says in the error what the file is for.

    Raises:
      UserError: the file is missing, cut off or not JSON.
    """
    try:
        return json.loads(_read_text(path))
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
        lines = _read_text(path).split("\n")
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


def _read_text(path: str | Path) -> str:
    path = as_path(path)
    with bucket_errors(path):
        return path.read_bytes().decode()


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
