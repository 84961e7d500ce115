"""Anything that speaks OpenAI's chat protocol: GPT models, or an open multimodal model on a local server."""

from __future__ import annotations

import base64

from sqa_jax.errors import UserError
from sqa_jax.teach.prompts import encoded_image
from sqa_jax.teach.teacher import Refused, Reply, Request, Transient, http_failure, network_failure, read_key


class OpenAICompatible:
    """Args:
      config: the whole configuration.

    Raises:
      UserError: there is no key, or the package is not installed.
    """

    def __init__(self, config):
        settings = config.teach
        self.model = settings.model
        self.identity = {"model": self.model}
        self._temperature, self._most = settings.temperature, settings.max_output_tokens
        # Another server never gets OpenAI's key by default; most local ones need none.
        needs_none = settings.endpoint and not settings.key_env
        self._key = "none" if needs_none else read_key(settings.key_env or "OPENAI_API_KEY")
        self._secret = "" if needs_none else self._key
        # Reasoning models and newer ones know only the second name, other servers often only the first.
        self._limit = "max_tokens" if settings.endpoint else "max_completion_tokens"
        try:
            import openai
        except ImportError:
            raise UserError(
                "config.teach.client is openai, which needs the package openai: pip install -e '.[teachers]'"
            ) from None
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=settings.endpoint or "https://api.openai.com/v1",
            timeout=settings.timeout,
            max_retries=0,  # the client's own retries would hide attempts from the ledger and the rate limit
        )

    def ask(self, request: Request) -> Reply:
        """Sends one request, once. Raises `Transient` or `Refused`."""
        from openai import APIStatusError

        content: str | list = request.prompt
        if request.image is not None:
            mime, encoded = encoded_image(request.image)
            url = f"data:{mime};base64,{base64.b64encode(encoded).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.prompt}]
        failure: Transient | Refused
        try:
            response = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                temperature=self._temperature,
                **{self._limit: self._most},
            )
            if not response.choices:  # a body that is not the protocol's becomes an object without content
                raise ValueError("the reply has no choices")
            return _reply(response)
        except APIStatusError as error:
            failure = http_failure(
                error.status_code, error.response.text, error.response.headers, self.model, self._secret
            )
        except Exception as error:  # from the network, from the parser of the body: no usable reply came
            failure = network_failure(error, self._secret)
        raise failure  # outside the handler: the client's exceptions hold the request, and with it the key


def _reply(response) -> Reply:
    choice, usage = response.choices[0], response.usage
    text, refusal = choice.message.content or "", getattr(choice.message, "refusal", None)
    blocked = bool(refusal) or choice.finish_reason == "content_filter"
    return Reply(
        "blocked" if blocked else "cut_off" if choice.finish_reason == "length" else "ok",
        text or refusal or "",
        usage.prompt_tokens if usage else None,
        usage.completion_tokens if usage else None,
    )
