"""Files in a Google Cloud Storage bucket: access check, error messages, and logs by repeated upload.

Objects are atomic: written and replaced as a whole. Nothing can be appended to one, and no folder can be renamed. Paths
are `etils.epath`s on gcsfs, which orbax writes checkpoints to as well.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import re
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from sqa_jax.errors import UserError

# Google's libraries warn at import about the Python versions that they will support; TensorBoard's writer imports them.
warnings.filterwarnings("ignore", "You are using a Python version", FutureWarning)

UPLOAD_SECONDS = 30.0  # minimum time between two uploads of a growing object
ANSWER_SECONDS = 60.0  # time limit of `check_access`
REQUEST_SECONDS = 60.0  # time limit of a single request, which is retried

# (regex on an error of any of the three libraries that access the bucket, what is wrong and what to do about it)
_EXPLANATIONS = (
    (
        r"DefaultCredentials|Anonymous caller|Invalid Credentials|UNAUTHENTICATED|Unauthorized|HttpError.*, 401",
        "there are no valid Google credentials here; run `gcloud auth application-default login`, or give the machine a service account "
        "with the scope cloud-platform",
    ),
    (
        r"Forbidden|PERMISSION_DENIED",
        "access is refused; give the account that runs this roles/storage.objectAdmin and roles/storage.legacyBucketReader on gs://{bucket}",
    ),
    (
        r"bucket does not exist|NotFound: 404 GET|/b/[^/ ]+(/o(\?\S*)?)?$|Invalid GCS bucket name",
        "there is no such bucket; make it with `gcloud storage buckets create gs://{bucket}`, or name another",
    ),
    (
        r"Client(Connect|OS|Payload)\w*Error|ServerDisconnected|Connection(Reset|Refused)?Error|TransportError|RetryError|TimeoutError"
        r"|ServiceUnavailable|InternalServerError|ProxyError|UNAVAILABLE|DEADLINE_EXCEEDED|HttpError.*, (429|50[0-4])",
        "it cannot be reached; look at the network and start the same command again",
    ),
)


def in_bucket(path: Any) -> bool:
    return str(path).startswith("gs://")


def bucket_path(path: Any) -> Path:
    """The `epath.Path` of gs://bucket/….

    Raises:
      UserError: the libraries for buckets are not installed.
    """
    from etils import epath
    from fsspec import config as fsspec_config

    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: buckets need `pip install -e '.[gcs]'` ({error})") from None
    # No listings cache, since other processes write there too. Set before the first connection, which keeps it.
    fsspec_config.conf["gcs"] = {"use_listings_cache": False, "requests_timeout": REQUEST_SECONDS}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # the exception reports it once
    return cast(Path, epath.Path(path))  # it has pathlib's methods, without being a subclass


def bucket_name(path: Any) -> str:
    return str(path).removeprefix("gs://").partition("/")[0]


@contextlib.contextmanager
def bucket_errors(path: Any) -> Iterator[None]:
    """Turns errors of a bucket or of the network into a `UserError`. No effect for a local path."""
    try:
        yield
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        explanation = next((text for pattern, text in _EXPLANATIONS if re.search(pattern, message)), None)
        if not in_bucket(path) or isinstance(error, UserError) or explanation is None:
            raise
        raise UserError(f"{path}: {explanation.format(bucket=bucket_name(path))} ({message[:300]})") from error


def check_access(path: Path) -> None:
    """Tries every operation that a run needs: gets the bucket, writes, reads, lists and deletes an object.

    Raises:
      UserError: an operation is refused, the bucket does not exist, or it has not answered within `ANSWER_SECONDS`.
    """
    answer: concurrent.futures.Future[None] = concurrent.futures.Future()

    def ask() -> None:
        try:
            from google.cloud import storage

            # Orbax does the same to find out how folders work there; it fails if there are no credentials.
            storage.Client().get_bucket(bucket_name(path))
            probe = path / f".probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"probe")
            probe.read_bytes()
            list(path.iterdir())
            probe.unlink()
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)

    # A daemon thread, not joined after the time limit: a search for credentials can take minutes and cannot be cancelled.
    threading.Thread(target=ask, daemon=True).start()
    with bucket_errors(path):
        if not concurrent.futures.wait([answer], ANSWER_SECONDS).done:
            raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
        answer.result()


class GrowingObject:
    """An object with growing content, which a background thread uploads again as a whole.

    The error of a failed upload is raised by the next call.

    Args:
      path: of the object.
      content: returns the current content.
    """

    def __init__(self, path: Path, content: Callable[[], bytes]):
        self._path, self._content = path, content
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._upload: concurrent.futures.Future[Any] | None = None
        self._started_at = time.monotonic()

    def update(self) -> None:
        """Starts an upload if the last one is done and started `UPLOAD_SECONDS` ago; else a later call does."""
        if self._upload is None or self._upload.done():
            self._settle()
            if time.monotonic() - self._started_at >= UPLOAD_SECONDS:
                self._start()

    def flush(self) -> None:
        """Uploads the content and waits for it."""
        self._settle()
        self._start()
        self._settle()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._upload = self._thread.submit(self._path.write_bytes, self._content())

    def _settle(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()


class BucketLog:
    """A log of lines in a bucket, with the methods of a file opened for appending; see `sqa_jax.files.open_log`."""

    def __init__(self, path: Path):
        self._text = bytearray(path.read_bytes() if path.exists() else b"")
        self._object = GrowingObject(path, lambda: bytes(self._text))

    def write(self, text: str) -> None:
        self._text += text.encode()
        self._object.update()

    def flush(self) -> None:
        self._object.flush()

    close = flush

    def __enter__(self) -> BucketLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
