"""Gemini through `google-genai`: one request at a time, or in batch jobs at a part of the price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqa_jax.errors import UserError
from sqa_jax.teach.gemini import status_of
from sqa_jax.teach.prompts import encoded_image
from sqa_jax.teach.teacher import Refused, Reply, Request, Transient, http_failure, network_failure, read_key, scrub

BATCH_BYTES = 15_000_000  # the service takes 20 MB of requests inside one call
_ENDED = {"JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"}  # fmt: skip


class BatchEnd(NamedTuple):
    """A batch job that has ended.

    Attributes:
      replies: {hash: a reply, or the service's words of why there is none}.
      maybe_paid: whether requests without a reply may have been charged.
    """

    replies: dict[str, Reply | str]
    said: str
    maybe_paid: bool


class GenAI:
    """Args:
      config: the whole configuration.

    Raises:
      UserError: there is no key, or the package is not installed.
    """

    def __init__(self, config):
        settings = config.teach
        self.model = settings.model.removeprefix("models/")
        self.identity = {"model": self.model}
        self._key = read_key(settings.key_env or "GEMINI_API_KEY")
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
            api_version="v1beta",  # which has batch jobs; the package's own default changes with its version
            timeout=int(1000 * settings.timeout),
        )
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)
        self._generation = types.GenerateContentConfig(
            temperature=settings.temperature,
            max_output_tokens=settings.max_output_tokens,
            response_mime_type="application/json" if settings.reply == "json" else None,
        )

    def ask(self, request: Request) -> Reply:
        """Sends one request, once. Raises `Transient` or `Refused`."""
        generate = self._client.models.generate_content
        return _reply(self._call(generate, model=self.model, contents=self._content(request), config=self._generation))

    def request_bytes(self, request: Request) -> int:
        """About how long a request is inside a batch job's call."""
        image = len(encoded_image(request.image)[1]) if request.image else 0
        return 2 * len(request.prompt.encode()) + 4 * image // 3 + 1000

    def submit(self, name: str, requests: Sequence[Request]) -> str:
        """Hands in a batch job under our name; returns the service's. Raises `Transient` or `Refused`."""
        inlined = [
            self._types.InlinedRequest(
                contents=self._content(request), metadata={"key": request.hash}, config=self._generation
            )
            for request in requests
        ]
        job = self._call(self._client.batches.create, model=self.model, src=inlined, config={"display_name": name})
        return job.name

    def find(self, name: str) -> str | None:
        """The service's name of the batch job that was handed in under our name, or None where there is none."""

        def search() -> str | None:
            jobs = self._client.batches.list(config={"page_size": 100})
            return next((job.name for job in jobs if job.display_name == name), None)

        return self._call(search)

    def collect(self, job: str, hashes: Sequence[str]) -> BatchEnd | None:
        """What a batch job brought; None while it is under way.

        Args:
          hashes: of its requests, in the order they were handed in.
        """
        try:
            found = self._call(self._client.batches.get, name=job)
        except Refused as error:
            if "HTTP 404" not in str(error):
                raise
            return BatchEnd({}, f"batch job {job} is no longer there", maybe_paid=True)
        state = found.state.name if found.state else ""
        if state not in _ENDED:
            return None
        said = f"batch job {job} ended as {state}" + (
            f": {scrub(found.error.message or '', self._key)[:300]}" if found.error else ""
        )
        responses = (found.dest.inlined_responses if found.dest else None) or []
        replies: dict[str, Reply | str] = {}
        for position, response in enumerate(responses):
            key = (response.metadata or {}).get("key") or (hashes[position] if position < len(hashes) else "")
            if response.response is not None:
                replies[key] = _reply(response.response)
            else:
                replies[key] = scrub((response.error.message if response.error else "") or "no reply", self._key)[:300]
        # A failed job is not charged; of one that was stopped or ran out of time nobody knows.
        return BatchEnd(replies, said, maybe_paid=state in ("JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"))

    def _content(self, request: Request) -> Any:
        parts = [self._types.Part.from_text(text=request.prompt)]
        if request.image is not None:
            mime, content = encoded_image(request.image)
            parts.insert(0, self._types.Part.from_bytes(data=content, mime_type=mime))
        return self._types.Content(role="user", parts=parts)

    def _call(self, function, **arguments) -> Any:
        from google.genai.errors import APIError

        failure: Transient | Refused
        try:
            return function(**arguments)
        except APIError as error:
            headers = getattr(error.response, "headers", None) or {}
            failure = http_failure(int(error.code or 500), str(error.details), headers, self.model, self._key)
        except Exception as error:  # from the network, from the parser of the body: no usable reply came
            failure = network_failure(error, self._key)
        raise failure  # outside the handler: the client's exceptions hold the request, and with it the key


def _reply(response) -> Reply:
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
