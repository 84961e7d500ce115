"""What every teacher is, to the loop that asks it: requests in, replies out, and three kinds of failure."""

from __future__ import annotations

import dataclasses
import email.utils
import os
import re
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from sqa_jax.data.image import ImageFile
from sqa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """One question as it is put to a teacher.

    Attributes:
      hash: of everything that decides the reply; the ledger's key.
      sample: which of several replies to the same prompt.
      image: to be sent with the prompt, or None.
    """

    hash: str
    pid: str
    sample: int
    prompt: str
    image: ImageFile | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
      status: "ok", "cut_off" or "blocked", as the service said; what the text is worth is read later.
      output_tokens: all that is paid as output, with what the model thought unseen.
    """

    status: str
    raw: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Transient(Exception):
    """A failure that may pass: too many requests, a server's error, a cut connection.

    Attributes:
      retry_after: seconds that the service asked to wait, 0 where it did not say.
      maybe_paid: the service may have answered, and charged for it, although no reply arrived.
    """

    def __init__(self, message: str, retry_after: float = 0.0, maybe_paid: bool = False):
        super().__init__(message)
        self.retry_after, self.maybe_paid = retry_after, maybe_paid


class Refused(Exception):
    """The service will not answer this, however often it is asked.

    Attributes:
      every: it will refuse every question (a wrong key, an unknown model), not only this one.
    """

    def __init__(self, message: str, every: bool):
        super().__init__(message)
        self.every = every


class RemoteTeacher(Protocol):
    """A service that is asked one question at a time, from several threads."""

    model: str
    identity: Mapping[str, Any]  # what decides the replies besides the prompt and `config.teach`

    def ask(self, request: Request) -> Reply:
        """Raises `Transient` or `Refused`; neither holds the key."""
        ...


class LocalTeacher(Protocol):
    """A teacher in this process, that costs nothing and takes its own order."""

    model: str
    identity: Mapping[str, Any]
    price: float | None  # of a reply in US dollars, None where it is not known

    def ask_all(self, requests: Sequence[Request]) -> Generator[list[tuple[Request, Reply]], None, None]:
        """Yields the replies in pieces, as they come; a request that it knows nothing of is left out."""
        ...


def read_key(name: str) -> str:
    """The key in an environment variable.

    Raises:
      UserError: it is not set, or what is there cannot be a key. The message never shows it.
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


def scrub(text: str, *secrets: str) -> str:
    """The text in one line, without the secrets, and without half surrogate pairs, which no file takes."""
    text = text.encode("utf-8", "replace").decode()
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return " ".join(text.split())


def retry_after(headers: Mapping[str, str], body: str) -> float:
    """Seconds that a service asks to wait: its Retry-After header (seconds or a date), or Google's retryDelay."""
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


def http_failure(code: int, body: str, headers: Mapping[str, str], model: str, secret: str) -> Transient | Refused:
    """What an HTTP error means.

    Args:
      body: the service's words; shown shortened and without `secret`.
    """
    said = f"HTTP {code}: {scrub(body, secret)[:300]}"
    quota = code == 402 or "insufficient_quota" in body
    if (code in (408, 425, 429) or code >= 500) and not quota:
        # At 408 and 504 somebody stopped waiting, which says nothing of what the model went on to do.
        return Transient(said, retry_after(headers, body), maybe_paid=code in (408, 504))
    if quota:
        return Refused(f"the account has no credit left ({said}); add some and run the same command again", True)
    if code in (401, 403) or re.search(r"api[_ ]key", body, re.IGNORECASE):
        return Refused(f"the key is not accepted ({said}); export a valid key, or one that may use {model}", True)
    if code == 404:
        return Refused(
            f"model {model!r} is not there ({said}); check config.teach.model and config.teach.endpoint", True
        )
    return Refused(f"the service refuses the request ({said})", False)


def network_failure(error: BaseException, secret: str) -> Transient:
    """What a failure without an HTTP status means: only one to connect surely cost nothing."""
    unsent = {"ConnectError", "ConnectTimeout", "NewConnectionError", "NameResolutionError", "ConnectTimeoutError"}
    chain: list[BaseException] = [error]
    for link in chain:
        following = [getattr(link, name, None) for name in ("reason", "__cause__", "__context__")]
        chain += [e for e in (*following, *link.args) if isinstance(e, BaseException) and e not in chain]
    names = {type(link).__name__ for link in chain}
    return Transient(f"{type(error).__name__}: {scrub(str(error), secret)[:300]}", maybe_paid=not names & unsent)
