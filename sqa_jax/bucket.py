"""Files in a Google Cloud Storage bucket: what may be done there, what its answers mean, files that grow.

An object is there whole or not at all, and is replaced at once, but nothing can be appended to it and no folder can be
renamed. Paths are `etils.epath`s, which orbax writes checkpoints to as well; gcsfs carries them.
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

# Google's libraries say at import for how long they will support this Python; TensorBoard's writer imports them too.
warnings.filterwarnings("ignore", "You are using a Python version", FutureWarning)

UPLOAD_SECONDS = 30.0  # the least time between two uploads of a growing object
ANSWER_SECONDS = 60.0  # what `check_access` does must be done by then
REQUEST_SECONDS = 60.0  # of a single request, one of several tries

# What is found in the error of any of the three libraries that talk to the bucket, and what to do about it.
_MEANINGS = (
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
      UserError: what talks to buckets is not installed.
    """
    from etils import epath
    from fsspec import config as fsspec_config

    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: buckets need `pip install -e '.[gcs]'` ({error})") from None
    # Others write there too, so what was listed before says nothing now. Before the first connection, which keeps it.
    fsspec_config.conf["gcs"] = {"use_listings_cache": False, "requests_timeout": REQUEST_SECONDS}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # the exception says it once
    return cast(Path, epath.Path(path))  # it has pathlib's methods, without being a subclass


def bucket_name(path: Any) -> str:
    return str(path).removeprefix("gs://").partition("/")[0]


@contextlib.contextmanager
def bucket_errors(path: Any) -> Iterator[None]:
    """Turns what a bucket refuses, or the network, into a `UserError`. On a disk, does nothing."""
    try:
        yield
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        words = next((words for pattern, words in _MEANINGS if re.search(pattern, said)), None)
        if not in_bucket(path) or isinstance(error, UserError) or words is None:
            raise
        raise UserError(f"{path}: {words.format(bucket=bucket_name(path))} ({said[:300]})") from error


def check_access(path: Path) -> None:
    """Does once what a run does all the time: looks at the bucket, writes, reads, lists and removes an object.

    Raises:
      UserError: the bucket does not allow it, does not exist or has not answered within `ANSWER_SECONDS`.
    """
    answer: concurrent.futures.Future[None] = concurrent.futures.Future()

    def ask() -> None:
        try:
            from google.cloud import storage

            # Orbax asks for it, to know how folders are made there, and it finds the credentials or says that there are none.
            storage.Client().get_bucket(bucket_name(path))
            probe = path / f".probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"probe")
            probe.read_bytes()
            list(path.iterdir())
            probe.unlink()
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)

    # Not waited for after its time: the search for credentials, for one, can take minutes and cannot be told to stop.
    threading.Thread(target=ask, daemon=True).start()
    with bucket_errors(path):
        if not concurrent.futures.wait([answer], ANSWER_SECONDS).done:
            raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
        answer.result()


class GrowingObject:
    """An object that holds what grows here: uploaded anew, as a whole, by a thread of its own.

    An upload that failed is raised by the next call.

    Args:
      path: of the object.
      content: called for what it should hold now.
    """

    def __init__(self, path: Path, content: Callable[[], bytes]):
        self._path, self._content = path, content
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._upload: concurrent.futures.Future[Any] | None = None
        self._began = time.monotonic()

    def update(self) -> None:
        """Starts an upload if the one before is done and began `UPLOAD_SECONDS` ago; else a later call will."""
        if self._upload is None or self._upload.done():
            self._settle()
            if time.monotonic() - self._began >= UPLOAD_SECONDS:
                self._start()

    def flush(self) -> None:
        """Uploads what there is and waits for it."""
        self._settle()
        self._start()
        self._settle()

    def _start(self) -> None:
        self._began = time.monotonic()
        self._upload = self._thread.submit(self._path.write_bytes, self._content())

    def _settle(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()


class BucketLog:
    """A text that grows by lines, as a file that was opened for appending does; see `sqa_jax.files.open_log`."""

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
