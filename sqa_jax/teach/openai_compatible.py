"""Client for the OpenAI chat completions API: GPT models, or an open multimodal model on a local server."""

from __future__ import annotations

import base64
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.teach.prompts import encoded_image
from sqa_jax.teach.teacher import RefusedError, Reply, Request, TransientError, http_error, network_error, read_api_key


class OpenAICompatible:
    """A `RemoteTeacher`.

    Args:
      config: the whole configuration.

    Raises:
      UserError: there is no API key, or the package is not installed.
    """

    def __init__(self, config: Any):
        settings = config.teach
        self.model = settings.model
        self.identity = {"model": self.model}
        # Another server never gets OpenAI's key by default; most local ones need none.
        keyless = settings.endpoint and not settings.key_env
        key = "none" if keyless else read_api_key(settings.key_env or "OPENAI_API_KEY")
        self._secret = "" if keyless else key
        # Newer OpenAI models only accept the second name, other servers often only the first.
        limit = "max_tokens" if settings.endpoint else "max_completion_tokens"
        self._options: dict[str, Any] = {"temperature": settings.temperature, limit: settings.max_output_tokens}
        try:
            import openai
        except ImportError:
            raise UserError(
                "config.teach.client is openai, which needs the package openai: pip install -e '.[teachers]'"
            ) from None
        self._client = openai.OpenAI(
            api_key=key,
            base_url=settings.endpoint or "https://api.openai.com/v1",
            timeout=settings.timeout,
            max_retries=0,  # retries inside the client would bypass the ledger and the rate limit
        )

    def ask(self, request: Request) -> Reply:
        """Sends one request, once. Raises `TransientError` or `RefusedError`."""
        from openai import APIStatusError

        content: Any = request.prompt
        if request.image is not None:
            mime, encoded = encoded_image(request.image)
            url = f"data:{mime};base64,{base64.b64encode(encoded).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.prompt}]
        failure: TransientError | RefusedError
        try:
            response = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                **self._options,
            )
            if not response.choices:  # a body in another format becomes an object without content
                raise ValueError("the reply has no choices")
            return _reply(response)
        except APIStatusError as error:
            failure = http_error(
                error.status_code, error.response.text, error.response.headers, self.model, self._secret
            )
        except Exception as error:  # network or parse errors: no usable reply
            failure = network_error(error, self._secret)
        raise failure  # outside the handler: the client's exceptions refer to the request, which contains the key


def _reply(response: Any) -> Reply:
    choice, usage = response.choices[0], response.usage
    text, refusal = choice.message.content or "", getattr(choice.message, "refusal", None)
    blocked = bool(refusal) or choice.finish_reason == "content_filter"
    return Reply(
        "blocked" if blocked else "cut_off" if choice.finish_reason == "length" else "ok",
        text or refusal or "",
        usage.prompt_tokens if usage else None,
        usage.completion_tokens if usage else None,
    )
