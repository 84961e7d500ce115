"""Atomic files and folders: write to a temporary, fsync, rename. On a disk or, where documented, in a bucket."""

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
    """A local path, or for gs://bucket/… an `epath.Path`, which has the same methods.

    Raises:
      UserError: it is in another kind of store, or the libraries for buckets are not installed.
    """
    if in_bucket(path):
        return bucket_path(path)
    return local_path(path, "gs:// is the only store that is known, and all else")


def local_path(path: str | Path, what: str) -> Path:
    """A path on this machine's disk.

    Args:
      what: what must be on the disk, for the error.

    Raises:
      UserError: it is a URL.
    """
    if "://" in str(path):
        raise UserError(f"{path}: {what} must be on this machine's disk; name a place there")
    return Path(path)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns a full disk, a missing permission or an error of a bucket while writing `path` into a `UserError`."""
    try:
        with bucket_errors(path):
            yield
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # Orbax reports a full disk as a ValueError.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise UserError(f"{path}: the disk is full; free some space or choose another place") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{path}: cannot be written ({os.strerror(number)}); choose a place you may write to"
            ) from error
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a temporary file in the same folder and renames it to `path` when the block succeeds.

    After a crash, a full disk or an exception, `path` is unchanged. In a bucket, the content is kept in memory and
    uploaded as a whole.

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
            # mkstemp creates a private file; give it the permissions of any new file.
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
    """Yields a temporary directory that is renamed to `path` when the block succeeds.

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
    """Removes temporary directories of killed processes; only those a day old, which no process still writes."""
    for left in path.parent.glob(f".{path.name}.*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)


def open_log(path: str | Path) -> IO[str] | BucketLog:
    """Opens a log file for appending lines, with `write`, `flush` and `close`.

    On a disk a line is stored when `write` returns. In a bucket it is uploaded some seconds later, or when `flush` or
    `close` returns.
    """
    path = as_path(path)
    return BucketLog(path) if in_bucket(path) else open(path, "a", encoding="utf-8", buffering=1)


def archive(folder: str | Path, target: str | Path) -> None:
    """Renames a folder of files. In a bucket all files are copied before any is removed; a failure may leave some in `folder`."""
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
    """Reads a JSON file; `what` describes its content, for the error.

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
    """Reads a JSONL file, one JSON object per line, skipping blank lines.

    Raises:
      UserError: the file is missing, or a line is not a JSON object (the line is named).
    """
    try:
        # Not splitlines(), which also splits at U+2028 and other characters that texts may contain.
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
            raise UserError(f"{path}:{number}: not a JSON object; fix or remove this line of {what}")
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
    """SHA-256 of a file as a hex digest, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces), as a hex digest."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
