"""The interface of a teacher: requests, replies, transient and permanent errors, and how HTTP errors map to them."""

from __future__ import annotations

import dataclasses
import email.utils
import os
import re
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sqa_jax.data.image import ImageFile
from sqa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt for a teacher.

    Attributes:
      hash: of everything that determines the reply; the ledger's key.
      sample: index among several replies to the same prompt.
      image: sent with the prompt, or None.
    """

    hash: str
    pid: str
    sample: int
    prompt: str
    image: ImageFile | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """A teacher's reply.

    Attributes:
      status: "ok", "cut_off" or "blocked", as the service reported; the text itself is parsed later.
      output_tokens: all tokens billed as output, hidden reasoning tokens included.
    """

    status: str
    raw: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class TransientError(Exception):
    """A failure that is worth a retry: rate limit, server error, dropped connection.

    Attributes:
      retry_after: seconds that the service asked to wait, 0 if it did not say.
      maybe_paid: the service may have generated, and charged for, a reply that never arrived.
    """

    def __init__(self, message: str, retry_after: float = 0.0, maybe_paid: bool = False):
        super().__init__(message)
        self.retry_after, self.maybe_paid = retry_after, maybe_paid


class RefusedError(Exception):
    """A permanent failure: retrying this request is pointless.

    Attributes:
      every_request: it affects every request (a wrong key, an unknown model), not only this one.
    """

    def __init__(self, message: str, every_request: bool):
        super().__init__(message)
        self.every_request = every_request


class Teacher(Protocol):
    """What every teacher has."""

    @property
    def model(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What determines the replies besides the prompt and `config.teach`."""
        ...


class RemoteTeacher(Teacher, Protocol):
    """A service that is sent one request at a time, from several threads."""

    def ask(self, request: Request) -> Reply:
        """Raises `TransientError` or `RefusedError`; neither contains the key."""
        ...


@runtime_checkable
class LocalTeacher(Teacher, Protocol):
    """A teacher in this process, free of charge, which processes requests in its own order."""

    @property
    def price(self) -> float | None:
        """US dollars of a reply, None if unknown."""
        ...

    def ask_all(self, requests: Sequence[Request]) -> Generator[list[tuple[Request, Reply]], None, None]:
        """Yields the replies in chunks, as they are generated; requests that it cannot answer are left out."""
        ...


def read_api_key(name: str) -> str:
    """The API key in an environment variable.

    Raises:
      UserError: it is not set, or its value cannot be a key. The message never shows the value.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise UserError(
            "config.teach.key_env is not the name of an environment variable, such as GEMINI_API_KEY; "
            "the key itself belongs into that variable, never into a setting"
        )
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"{name} is not set in the environment; export your key there")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(f"{name} holds blanks or characters that no key has; export the key alone")
    return key


def redact(text: str, *secrets: str) -> str:
    """The text on one line, with the secrets masked and lone surrogates replaced, which no file can store."""
    text = text.encode("utf-8", "replace").decode()
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return " ".join(text.split())


def retry_after(headers: Mapping[str, str], body: str) -> float:
    """Seconds that a service asks to wait: the Retry-After header (seconds or a date), or Google's retryDelay."""
    value = headers.get("Retry-After") or headers.get("retry-after") or ""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 0.0
    match = re.search(r"retryDelay['\"]?\s*:\s*['\"]([\d.]+)s", body)
    return float(match[1]) if match else 0.0


def http_error(
    code: int, body: str, headers: Mapping[str, str], model: str, secret: str
) -> TransientError | RefusedError:
    """Classifies an HTTP error response.

    Args:
      body: of the response; shown shortened and with `secret` masked.
    """
    shown = f"HTTP {code}: {redact(body, secret)[:300]}"
    quota = code == 402 or "insufficient_quota" in body
    if (code in (408, 425, 429) or code >= 500) and not quota:
        # 408 and 504 are timeouts: the model may have gone on generating.
        return TransientError(shown, retry_after(headers, body), maybe_paid=code in (408, 504))
    if quota:
        return RefusedError(f"the account has no credit left ({shown}); add some and run the same command again", True)
    if code in (401, 403) or re.search(r"api[_ ]key", body, re.IGNORECASE):
        return RefusedError(f"the key is not accepted ({shown}); export a valid key, or one that may use {model}", True)
    if code == 404:
        return RefusedError(
            f"model {model!r} is not there ({shown}); check config.teach.model and config.teach.endpoint", True
        )
    return RefusedError(f"the service refuses the request ({shown})", False)


def network_error(error: BaseException, secret: str) -> TransientError:
    """Classifies a failure without an HTTP status: only failures to connect are certainly free of charge."""
    unsent = {"ConnectError", "ConnectTimeout", "NewConnectionError", "NameResolutionError", "ConnectTimeoutError"}
    chain: list[BaseException] = [error]
    for link in chain:
        causes = [getattr(link, name, None) for name in ("reason", "__cause__", "__context__")]
        chain += [e for e in (*causes, *link.args) if isinstance(e, BaseException) and e not in chain]
    names = {type(link).__name__ for link in chain}
    return TransientError(f"{type(error).__name__}: {redact(str(error), secret)[:300]}", maybe_paid=not names & unsent)
