"""Messages of the fake teacher service: the scripted acts, and the requests and replies of both APIs."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from typing import Any

KEY = "sk-Very+Secret/0123456789=="  # with characters that are written otherwise in URLs and JSON
KEY_ENV = "TEST_TEACHER_KEY"
MODEL = "teacher-1"
PRICES = ((MODEL, 1.0, 10.0),)  # US dollars a million tokens
OUTPUT_TOKENS = 50
GOOD = json.dumps({"reasoning": "Iron is attracted.", "answer": 0, "solution": "Magnets attract iron."})
CLIENTS = ("gemini", "genai", "openai")


@dataclasses.dataclass(frozen=True)
class Say:
    """A reply that is billed.

    `finish`: stop, length, safety (the reply is blocked), prompt (the prompt is), or a number that only a newer client
    knows.
    """

    text: str = GOOD
    finish: str | int = "stop"
    usage: bool = True


@dataclasses.dataclass(frozen=True)
class Fail:
    """An HTTP error, which costs nothing. `retry_after`: "2" or a date; `delay`: Google's own form, in the body."""

    code: int
    message: str = "try again later"
    retry_after: str = ""
    delay: str = ""


@dataclasses.dataclass(frozen=True)
class Break:
    """A reply that is billed and never arrives whole: late (after `seconds`), silent (the connection is closed), cut
    (in the middle of the body), not_json, or held until the server's `go` is set."""

    how: str
    seconds: float = 0.0


@dataclasses.dataclass
class Call:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    pid: str = ""
    prompt: str = ""
    images: tuple[bytes, ...] = ()
    dollars: float = 0.0


def tokens(prompt: str, images: tuple[bytes, ...]) -> int:
    return len(prompt) // 4 + 258 * len(images)


def price(prompt: str, images: tuple[bytes, ...]) -> float:
    return (tokens(prompt, images) * PRICES[0][1] + OUTPUT_TOKENS * PRICES[0][2]) / 1e6


def read_gemini(body: dict[str, Any]) -> tuple[str, str, tuple[bytes, ...]]:
    """(pid, prompt, images) of a request in Gemini's form."""
    parts = body["contents"][0]["parts"]
    data = [part["inlineData"]["data"] for part in parts if "inlineData" in part]
    # The protocol's JSON has standard base64; one of the clients writes the URL-safe kind, which is allowed.
    images = tuple(base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True) for text in data)
    return _found("".join(part.get("text", "") for part in parts), images)


def read_openai(body: dict[str, Any]) -> tuple[str, str, tuple[bytes, ...]]:
    content = body["messages"][0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    images = tuple(base64.b64decode(url.partition(";base64,")[2], validate=True) for url in urls)
    return _found("".join(part.get("text", "") for part in parts), images)


def _found(prompt: str, images: tuple[bytes, ...]) -> tuple[str, str, tuple[bytes, ...]]:
    match = re.search(r"\[(\w+)\]", prompt)
    return (match[1] if match else "", prompt, images)


def gemini_reply(act: Say, call: Call, numbers: bool) -> dict[str, Any]:
    """`numbers`: the query asked for enumerations as numbers."""
    names = {"stop": ("STOP", 1), "length": ("MAX_TOKENS", 2), "safety": ("SAFETY", 3)}
    asked = tokens(call.prompt, call.images)
    # Part of the output are hidden reasoning tokens, billed like the rest.
    usage = {"promptTokenCount": asked, "candidatesTokenCount": 20, "thoughtsTokenCount": OUTPUT_TOKENS - 20}
    usage["totalTokenCount"] = asked + OUTPUT_TOKENS
    reply: dict[str, Any] = {"usageMetadata": usage} if act.usage else {}
    if act.finish == "prompt":
        return reply | {"promptFeedback": {"blockReason": 1 if numbers else "SAFETY"}}
    newer = act.finish if numbers else f"REASON_{act.finish}"
    finish = names[act.finish][numbers] if act.finish in names else newer
    content = {"role": "model", "parts": [{"text": act.text}] if act.text else []}
    return reply | {"candidates": [{"content": content, "finishReason": finish}]}


def openai_reply(act: Say, call: Call) -> dict[str, Any]:
    asked = tokens(call.prompt, call.images)
    message: dict[str, Any] = {"role": "assistant", "content": act.text}
    if act.finish == "prompt":
        message |= {"content": None, "refusal": "I cannot help with that."}
    finish = {"safety": "content_filter", "length": "length"}.get(act.finish, "stop")
    usage = {"prompt_tokens": asked, "completion_tokens": OUTPUT_TOKENS, "total_tokens": asked + OUTPUT_TOKENS}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    reply = {"id": "c", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
    return reply | ({"usage": usage} if act.usage else {})
