"""A teacher that misbehaves on request: Gemini's REST protocol with batch jobs, and OpenAI's chat protocol.

It finds a question's pid in its prompt as "[pid]", follows the script of that pid attempt by attempt, and keeps every
call with the time it came and what it would be billed, so that a test counts money on the service's side.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.server
import itertools
import json
import re
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable
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


class TeacherServer:
    """Serves on a free port while entered.

    Attributes:
      script: {pid: what happens at its first, second, … attempt}; afterwards, `usual`.
      lag: seconds that every reply takes.
      calls: every generation asked for, batch jobs' own calls apart, in the order they came.
      jobs: batch jobs by the service's name.
      job_state: how a job ends; "" leaves it under way.
      on_create: "" or what happens to calls that create a job: lost (made, but the answer never arrives), refused
        (never made, and no answer), held (made, and held until `go`).
    """

    def __init__(self) -> None:
        self.script: dict[str, list[Say | Fail | Break]] = {}
        self.usual: Say | Fail | Break = Say()
        self.lag = 0.0
        self.calls: list[Call] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.job_state, self.on_create = "SUCCEEDED", ""
        self.polls = self.under_way = self.most_under_way = 0
        self.go, self.closing, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self._turns: dict[str, itertools.count] = {}

    def __enter__(self) -> TeacherServer:
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"server_": self}))
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.go.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def url(self, client: str) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}" + ("/v1" if client == "openai" else "")

    def of(self, pid: str) -> list[Call]:
        return [call for call in list(self.calls) if call.pid == pid]

    @property
    def asked(self) -> list[str]:
        return [call.pid for call in list(self.calls)]

    @property
    def bill(self) -> float:
        """US dollars that this service would charge, lost replies included."""
        return sum(call.dollars for call in list(self.calls))

    def next_act(self, call: Call) -> Say | Fail | Break:
        with self.lock:
            self.calls.append(call)
            turn = next(self._turns.setdefault(call.pid, itertools.count()))
        acts = self.script.get(call.pid, [])
        act = acts[turn] if turn < len(acts) else self.usual
        call.dollars = 0.0 if isinstance(act, Fail) else price(call.prompt, call.images)
        return act

    def make_job(self, model: str, batch: dict[str, Any]) -> str:
        """Keeps a batch job, with its replies and its price, half the usual one."""
        rows = []
        for row in batch["inputConfig"]["requests"]["requests"]:
            call = Call("batch", {}, row["request"], time.monotonic(), *read_gemini(row["request"]))
            act = self.script.get(call.pid, [self.usual])[0]
            if isinstance(act, Fail):
                rows.append({"metadata": row.get("metadata"), "error": {"code": act.code, "message": act.message}})
                continue
            call.dollars = price(call.prompt, call.images) / 2
            self.calls.append(call)
            rows.append({"metadata": row.get("metadata"), "response": gemini_reply(act, call, False)})
        name = f"batches/job{len(self.jobs)}"
        self.jobs[name] = {"displayName": batch["displayName"], "model": model, "rows": rows}
        return name

    def job(self, name: str) -> dict[str, Any]:
        job, state = self.jobs[name], self.job_state or "RUNNING"
        metadata = {"displayName": job["displayName"], "model": job["model"], "state": f"BATCH_STATE_{state}"}
        if state == "SUCCEEDED":
            metadata["output"] = {"inlinedResponses": {"inlinedResponses": job["rows"]}}
        return {"name": name, "metadata": metadata, "done": bool(self.job_state)}


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
    # Part of the output is thought unseen, and has to be paid like the rest.
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


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: TeacherServer

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client gave up or was killed
            super().handle()

    def do_GET(self) -> None:
        server, (path, _, query) = self.server_, self.path.partition("?")
        if not self._known_key():
            return
        if path == "/v1beta/batches":
            # Newest last and two a page: whoever reads one page only does not find the latest job.
            first = int(urllib.parse.parse_qs(query).get("pageToken", ["0"])[0])
            page = {"operations": [server.job(name) for name in list(server.jobs)[first : first + 2]]}
            self._send(page | ({"nextPageToken": str(first + 2)} if first + 2 < len(server.jobs) else {}))
        elif (name := path.removeprefix("/v1beta/")) in server.jobs:
            server.polls += 1
            self._send(server.job(name))
        else:
            self._fail(Fail(404, "not found"))

    def do_POST(self) -> None:
        at, server = time.monotonic(), self.server_
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path, _, query = self.path.partition("?")
        is_openai = path == "/v1/chat/completions"
        model, _, method = path.removeprefix("/v1beta/models/").partition(":")
        if not self._known_key():
            return
        if (body.get("model") if is_openai else model) != MODEL:
            self._fail(Fail(404, "no such model"))
        elif method == "batchGenerateContent":
            self._create(model, body["batch"])
        elif is_openai or method == "generateContent":
            call = Call(path, dict(self.headers), body, at, *(read_openai if is_openai else read_gemini)(body))
            with server.lock:
                server.under_way += 1
                server.most_under_way = max(server.most_under_way, server.under_way)
            try:
                self._answer(server.next_act(call), call, is_openai, "enum-encoding" in query)
            finally:
                with server.lock:
                    server.under_way -= 1
        else:
            self._fail(Fail(404, "not found"))

    def _answer(self, act: Say | Fail | Break, call: Call, is_openai: bool, numbers: bool) -> None:
        server = self.server_
        server.closing.wait(server.lag)
        if isinstance(act, Fail):
            return self._fail(act)
        if isinstance(act, Break):
            if act.how == "silent":
                self.close_connection = True
                return None
            if act.how == "not_json":
                return self._send(b'{"candidates": [{"conte<html>')
            if act.how == "held":
                server.go.wait(30)
            server.closing.wait(act.seconds)
        said = act if isinstance(act, Say) else Say()
        reply = openai_reply(said, call) if is_openai else gemini_reply(said, call, numbers)
        return self._send(reply, cut=isinstance(act, Break) and act.how == "cut")

    def _create(self, model: str, batch: dict[str, Any]) -> None:
        server = self.server_
        if server.on_create == "refused":
            self.close_connection = True
            return
        name = server.make_job(model, batch)
        if server.on_create == "lost":
            self.close_connection = True
            return
        if server.on_create == "held":
            server.go.wait(30)
        self._send({**server.job(name), "done": False})

    def _known_key(self) -> bool:
        """Answers as the services do where the key is wrong."""
        bearer, google = self.headers.get("Authorization", ""), self.headers.get("x-goog-api-key", "")
        if KEY in (bearer.removeprefix("Bearer "), google):
            return True
        # Some services repeat the key that they were given.
        if bearer:
            self._fail(Fail(401, f"Incorrect API key provided: {bearer.removeprefix('Bearer ')}"))
        else:
            self._fail(Fail(400, f"API key not valid. Please pass a valid API key, not {google}"))
        return False

    def _fail(self, act: Fail) -> None:
        error: dict[str, Any] = {"code": act.code, "message": act.message, "status": "X"}
        if act.delay:
            error["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": act.delay}]
        self._send({"error": error}, act.code, {"Retry-After": act.retry_after} if act.retry_after else {})

    def _send(self, body: Any, code: int = 200, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        # Escaped, so that half a surrogate pair can be sent as some models send it.
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        self.close_connection = self.close_connection or cut


def write_questions(root, number: int = 4) -> str:
    """A data set in ScienceQA's layout: questions q0, q1, … of the split train, every other with an image."""
    from PIL import Image

    root.mkdir(exist_ok=True)
    rows = {}
    for k in range(number):
        pid = f"q{k}"
        rows[pid] = {
            "question": f"Which of these sticks to a magnet? [{pid}]", "choices": ["an iron nail", "a cork", "a cup"],
            "answer": 0, "hint": "", "task": "closed choice", "grade": "grade3", "subject": "natural science",
            "topic": "physics", "category": "Magnets", "skill": "Identify magnets", "image": None, "split": "train",
            "lecture": "LECTURE: a magnet attracts iron.", "solution": "SOLUTION: a nail is made of iron.",
        }  # fmt: skip
        if k % 2:
            rows[pid]["image"] = "image.png"
            folder = root / "images" / "train" / pid
            folder.mkdir(parents=True)
            Image.new("RGB", (3 + k, 5), (40 * k % 256, 7, 200)).save(folder / "image.png")
    (root / "problems.json").write_text(json.dumps(rows))
    (root / "pid_splits.json").write_text(json.dumps({"train": list(rows), "test": []}))
    return str(root)


def teach_config(data: str, server: TeacherServer | None, client: str, **change: Any):
    """Settings that ask this server; keywords change those of `config.teach`."""
    from sqa_jax.config import default

    config = default()
    flat = {
        "client": client, "model": MODEL, "prices": PRICES, "budget": 1.0, "key_env": KEY_ENV, "backoff": 0.01,
        "endpoint": server.url(client) if server else "", "timeout": 10.0, "max_output_tokens": 100,
        "poll_seconds": 0.02,
    } | change  # fmt: skip
    config.update_from_flattened_dict(
        {"data.source": "dir", "data.path": data} | {f"teach.{name}": value for name, value in flat.items()}
    )
    return config


def teach_flags(data: str, server: TeacherServer | None, client: str, workdir, **change: Any) -> list[str]:
    """The same settings as arguments of `python -m sqa_jax.teach`."""
    changed = ("client", "model", "prices", "budget", "key_env", "endpoint", "backoff", "max_output_tokens")
    settings = teach_config(data, server, client, **change).teach
    flags = [f"--config.teach.{name}={settings[name]}" for name in dict.fromkeys((*changed, "poll_seconds", *change))]
    return ["--config.data.source=dir", f"--config.data.path={data}", f"--workdir={workdir}", *flags]


def wait_until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def read_records(workdir) -> list[dict[str, Any]]:
    lines = (workdir / "records.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def read_attempts(workdir) -> list[dict[str, Any]]:
    """The ledger's attempts as another program reads them, also while a run writes them."""
    with contextlib.closing(sqlite3.connect(workdir / "ledger.sqlite")) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM attempts ORDER BY id")]
