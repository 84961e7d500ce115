"""Client for Gemini through `google-generativeai`, over REST."""

from __future__ import annotations

import warnings
from typing import Any

from sqa_jax.teach.prompts import encoded_image
from sqa_jax.teach.teacher import RefusedError, Reply, Request, TransientError, http_error, network_error, read_api_key

BLOCKS = frozenset({"BLOCKED", "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "OTHER", "IMAGE_SAFETY"})  # fmt: skip


def status_of(finish: str, blocked: bool) -> str:
    """A reply's status from Gemini's finish reason and from whether the prompt itself was blocked."""
    if blocked or finish in BLOCKS:
        return "blocked"
    return "cut_off" if finish == "MAX_TOKENS" else "ok"


class Gemini:
    """A `RemoteTeacher`.

    Args:
      config: the whole configuration.

    Raises:
      UserError: there is no API key.
    """

    def __init__(self, config: Any):
        settings = config.teach
        self.model = settings.model.removeprefix("models/")
        self.identity = {"model": self.model}
        self._timeout = settings.timeout
        self._key = read_api_key(settings.key_env or "GEMINI_API_KEY")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the deprecation notice of this package
            import google.generativeai as client
        options = {"api_endpoint": settings.endpoint.rstrip("/")} if settings.endpoint else None
        client.configure(  # pyright: ignore[reportPrivateImportUsage]
            api_key=self._key, transport="rest", client_options=options
        )
        generation: Any = {"temperature": settings.temperature, "max_output_tokens": settings.max_output_tokens}
        if settings.reply == "json":
            generation["response_mime_type"] = "application/json"
        self._client = client.GenerativeModel(  # pyright: ignore[reportPrivateImportUsage]
            self.model, generation_config=generation
        )

    def ask(self, request: Request) -> Reply:
        """Sends one request, once. Raises `TransientError` or `RefusedError`."""
        from google.api_core.exceptions import GoogleAPICallError

        parts: list = [request.prompt]
        if request.image is not None:
            mime, content = encoded_image(request.image)
            parts = [{"mime_type": mime, "data": content}, request.prompt]
        failure: TransientError | RefusedError
        try:
            # Retries inside the client would bypass the ledger and the rate limit.
            options: Any = {"timeout": self._timeout, "retry": None}
            response = self._client.generate_content(parts, request_options=options)
        except GoogleAPICallError as error:
            headers = getattr(error.response, "headers", {})
            body = f"{error.message} {error.response.text if error.response is not None else ''}"
            failure = http_error(int(error.code or 500), body, headers, self.model, self._key)
        except Exception as error:  # network or parse errors: no usable reply
            failure = network_error(error, self._key)
        else:
            return _reply(response)
        raise failure  # outside the handler: the client's exceptions refer to the request, which contains the key


def _reply(response: Any) -> Reply:
    candidate = response.candidates[0] if response.candidates else None
    usage = response.usage_metadata
    # total - prompt is all output, including reasoning tokens, for which this client has no field.
    prompt, output = usage.prompt_token_count, max(usage.candidates_token_count, usage.total_token_count - usage.prompt_token_count)  # fmt: skip
    counted = usage.total_token_count > 0
    # A finish reason that is newer than the client is a plain number.
    finish = getattr(candidate.finish_reason, "name", "") if candidate else ""
    return Reply(
        status_of(finish, bool(response.prompt_feedback.block_reason)),
        "".join(part.text for part in candidate.content.parts) if candidate else "",
        prompt if counted else None,
        output if counted else None,
    )
