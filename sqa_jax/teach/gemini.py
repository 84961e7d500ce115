"""Gemini through `google-generativeai`, over REST."""

from __future__ import annotations

import warnings

from sqa_jax.teach.prompts import encoded_image
from sqa_jax.teach.teacher import Refused, Reply, Request, Transient, http_failure, network_failure, read_key

BLOCKS = frozenset({"BLOCKED", "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "OTHER", "IMAGE_SAFETY"})  # fmt: skip


def status_of(finish: str, blocked: bool) -> str:
    """A reply's status from Gemini's finish reason and whether the prompt itself was blocked."""
    if blocked or finish in BLOCKS:
        return "blocked"
    return "cut_off" if finish == "MAX_TOKENS" else "ok"


class Gemini:
    """Args:
      config: the whole configuration.

    Raises:
      UserError: there is no key.
    """

    def __init__(self, config):
        settings = config.teach
        self.model = settings.model.removeprefix("models/")
        self.identity = {"model": self.model}
        self._timeout = settings.timeout
        self._key = read_key(settings.key_env or "GEMINI_API_KEY")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells every user that its support has ended
            import google.generativeai as client
        options = {"api_endpoint": settings.endpoint.rstrip("/")} if settings.endpoint else None
        client.configure(api_key=self._key, transport="rest", client_options=options)
        generation = {"temperature": settings.temperature, "max_output_tokens": settings.max_output_tokens}
        if settings.reply == "json":
            generation["response_mime_type"] = "application/json"
        self._client = client.GenerativeModel(self.model, generation_config=generation)

    def ask(self, request: Request) -> Reply:
        """Sends one request, once. Raises `Transient` or `Refused`."""
        from google.api_core.exceptions import GoogleAPICallError

        parts: list = [request.prompt]
        if request.image is not None:
            mime, content = encoded_image(request.image)
            parts = [{"mime_type": mime, "data": content}, request.prompt]
        failure: Transient | Refused
        try:
            # The client's own retries would hide attempts from the ledger and the rate limit.
            response = self._client.generate_content(parts, request_options={"timeout": self._timeout, "retry": None})
        except GoogleAPICallError as error:
            headers = getattr(error.response, "headers", {})
            body = f"{error.message} {error.response.text if error.response is not None else ''}"
            failure = http_failure(int(error.code or 500), body, headers, self.model, self._key)
        except Exception as error:  # from requests, from the parser of the body: no usable reply came
            failure = network_failure(error, self._key)
        else:
            return _reply(response)
        raise failure  # outside the handler: the client's exceptions hold the request, and with it the key


def _reply(response) -> Reply:
    candidate = response.candidates[0] if response.candidates else None
    usage = response.usage_metadata
    # total - prompt is all output, also what a newer model thought and this client has no name for.
    prompt, output = usage.prompt_token_count, max(usage.candidates_token_count, usage.total_token_count - usage.prompt_token_count)  # fmt: skip
    counted = usage.total_token_count > 0
    # A reason that is newer than the client is a plain number.
    finish = getattr(candidate.finish_reason, "name", "") if candidate else ""
    return Reply(
        status_of(finish, bool(response.prompt_feedback.block_reason)),
        "".join(part.text for part in candidate.content.parts) if candidate else "",
        prompt if counted else None,
        output if counted else None,
    )
