"""Client for Gemini through `google-genai`: single requests, or batch jobs at a discount."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqa_jax.errors import UserError
from sqa_jax.teach.gemini import status_of
from sqa_jax.teach.prompts import encoded_image
from sqa_jax.teach.teacher import (
    RefusedError,
    Reply,
    Request,
    TransientError,
    http_error,
    network_error,
    read_api_key,
    redact,
)

BATCH_BYTES = 15_000_000  # the service accepts 20 MB of inlined requests in one call
_ENDED = {"JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"}  # fmt: skip


class BatchResult(NamedTuple):
    """A batch job that has ended.

    Attributes:
      replies: {request hash: reply, or the service's error message}.
      message: how the job ended.
      maybe_paid: whether requests without a reply may have been charged.
    """

    replies: dict[str, Reply | str]
    message: str
    maybe_paid: bool


class GenAI:
    """A `RemoteTeacher` that also has batch jobs.

    Args:
      config: the whole configuration.

    Raises:
      UserError: there is no API key, or the package is not installed.
    """

    def __init__(self, config: Any):
        settings = config.teach
        self.model = settings.model.removeprefix("models/")
        self.identity = {"model": self.model}
        self._key = read_api_key(settings.key_env or "GEMINI_API_KEY")
        try:
            from google import genai
            from google.genai import types
        except ImportError:
            raise UserError(
                "config.teach.client is genai, which needs the package google-genai: pip install -e '.[teachers]'"
            ) from None
        self._types = types
        options = types.HttpOptions(
            base_url=settings.endpoint or None,
            api_version="v1beta",  # has batch jobs; the default depends on the package's version
            timeout=int(1000 * settings.timeout),
        )
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)
        self._generation = types.GenerateContentConfig(
            temperature=settings.temperature,
            max_output_tokens=settings.max_output_tokens,
            response_mime_type="application/json" if settings.reply == "json" else None,
        )

    def ask(self, request: Request) -> Reply:
        """Sends one request, once. Raises `TransientError` or `RefusedError`."""
        generate = self._client.models.generate_content
        return _reply(self._call(generate, model=self.model, contents=self._content(request), config=self._generation))

    def request_bytes(self, request: Request) -> int:
        """Estimated size of a request inlined in a batch job."""
        image = len(encoded_image(request.image)[1]) if request.image else 0
        return 2 * len(request.prompt.encode()) + 4 * image // 3 + 1000

    def submit(self, name: str, requests: Sequence[Request]) -> str:
        """Submits a batch job under a display name; returns the service's name. Raises `TransientError` or `RefusedError`."""
        inlined = [
            self._types.InlinedRequest(
                contents=self._content(request), metadata={"key": request.hash}, config=self._generation
            )
            for request in requests
        ]
        job = self._call(self._client.batches.create, model=self.model, src=inlined, config={"display_name": name})
        return job.name or ""

    def find(self, name: str) -> str | None:
        """The service's name of the batch job with a display name, or None if there is none."""

        def search() -> str | None:
            jobs = self._client.batches.list(config={"page_size": 100})
            return next((job.name for job in jobs if job.display_name == name), None)

        return self._call(search)

    def collect(self, job: str, hashes: Sequence[str]) -> BatchResult | None:
        """The result of a batch job; None while it is running.

        Args:
          hashes: of its requests, in submission order.
        """
        try:
            found = self._call(self._client.batches.get, name=job)
        except RefusedError as error:
            if "HTTP 404" not in str(error):
                raise
            return BatchResult({}, f"batch job {job} is no longer there", maybe_paid=True)
        state = found.state.name if found.state else ""
        if state not in _ENDED:
            return None
        message = f"batch job {job} ended as {state}" + (
            f": {redact(found.error.message or '', self._key)[:300]}" if found.error else ""
        )
        responses = (found.dest.inlined_responses if found.dest else None) or []
        replies: dict[str, Reply | str] = {}
        for position, response in enumerate(responses):
            key = (response.metadata or {}).get("key") or (hashes[position] if position < len(hashes) else "")
            if response.response is not None:
                replies[key] = _reply(response.response)
            else:
                replies[key] = redact((response.error.message if response.error else "") or "no reply", self._key)[:300]
        # A failed job is not charged; a cancelled or expired one may be.
        return BatchResult(replies, message, maybe_paid=state in ("JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"))

    def _content(self, request: Request) -> Any:
        parts = [self._types.Part.from_text(text=request.prompt)]
        if request.image is not None:
            mime, content = encoded_image(request.image)
            parts.insert(0, self._types.Part.from_bytes(data=content, mime_type=mime))
        return self._types.Content(role="user", parts=parts)

    def _call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        from google.genai.errors import APIError

        failure: TransientError | RefusedError
        try:
            return function(**arguments)
        except APIError as error:
            headers = getattr(error.response, "headers", None) or {}
            failure = http_error(int(error.code or 500), str(error.details), headers, self.model, self._key)
        except Exception as error:  # network or parse errors: no usable reply
            failure = network_error(error, self._key)
        raise failure  # outside the handler: the client's exceptions refer to the request, which contains the key


def _reply(response: Any) -> Reply:
    candidate = response.candidates[0] if response.candidates else None
    parts = (candidate.content.parts if candidate and candidate.content else None) or []
    feedback, usage = response.prompt_feedback, response.usage_metadata
    finish = candidate.finish_reason.name if candidate and candidate.finish_reason else ""
    prompt = output = None
    if usage is not None and usage.total_token_count:
        prompt = usage.prompt_token_count or 0
        output = max(
            (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0), usage.total_token_count - prompt
        )
    return Reply(
        status_of(finish, bool(feedback and feedback.block_reason)),
        "".join(part.text for part in parts if part.text and not part.thought),
        prompt,
        output,
    )
