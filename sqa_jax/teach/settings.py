"""Checks of `config.teach`, and the teacher that it names."""

from __future__ import annotations

from typing import Any

from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import STATUSES
from sqa_jax.errors import UserError
from sqa_jax.teach.teacher import LocalTeacher, RemoteTeacher

REMOTE_CLIENTS = ("gemini", "genai", "openai")
CLIENTS = (*REMOTE_CLIENTS, "student", "replay")


def check_settings(settings: Any) -> None:
    """Raises `UserError` for values of `config.teach` that can only be mistakes."""

    def need(valid: bool, name: str, advice: str) -> None:
        if not valid:
            raise UserError(f"config.teach.{name} is {settings[name]!r}; {advice}")

    need(settings.client in CLIENTS, "client", f"choose one of {', '.join(CLIENTS)}")
    need(settings.samples >= 1, "samples", "ask for at least one reply")
    need(
        settings.samples == 1 or settings.temperature > 0 or settings.client == "replay",
        "temperature", "several samples of a question would all be the same reply; set it above 0, or samples to 1",
    )  # fmt: skip
    for name in ("concurrency", "max_output_tokens", "ask_at_most", "batch_requests"):
        need(settings[name] >= 1, name, "it must be 1 or more")
    for name in ("limit", "retries", "requests_per_minute", "temperature", "backoff", "image_tokens", "budget"):
        need(settings[name] >= 0, name, "it must not be negative")
    for name in ("timeout", "poll_seconds"):
        need(settings[name] > 0, name, "it must be more than 0 seconds")
    need(0 < settings.batch_discount <= 1, "batch_discount", "it is a fraction of the usual price, such as 0.5")
    need(not settings.batch or settings.client == "genai", "batch", "only the client genai has batch jobs")
    repeatable = [status for status in STATUSES if status != "ok"]
    need(set(settings.ask_again) <= set(repeatable), "ask_again", f"choose of {', '.join(repeatable)}")


def make_teacher(config: Any, problems: ProblemSet) -> RemoteTeacher | LocalTeacher:
    """The teacher that `config.teach.client` names; a client library is only imported if its client is chosen."""
    client = config.teach.client
    if client == "gemini":
        from sqa_jax.teach.gemini import Gemini

        return Gemini(config)
    if client == "genai":
        from sqa_jax.teach.genai import GenAI

        return GenAI(config)
    if client == "openai":
        from sqa_jax.teach.openai_compatible import OpenAICompatible

        return OpenAICompatible(config)
    if client == "student":
        from sqa_jax.teach.student import StudentTeacher

        return StudentTeacher(config)
    from sqa_jax.teach.replay import Replay

    return Replay(config, problems)
