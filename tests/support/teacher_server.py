"""A fake teacher service with fault injection: Gemini's REST API with batch jobs, and OpenAI's chat completions API.

It finds a question's pid in its prompt as "[pid]", follows the script of that pid attempt by attempt, and records every
call with its arrival time and its price, so that tests count money on the service's side.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from tests.support.teacher_messages import (  # noqa: F401  for the tests, too
    CLIENTS,
    KEY,
    KEY_ENV,
    MODEL,
    PRICES,
    Break,
    Call,
    Fail,
    Say,
    gemini_reply,
    openai_reply,
    price,
    read_gemini,
    read_openai,
)


class TeacherServer:
    """Serves on a free port while entered.

    Attributes:
      script: {pid: what happens at its first, second, … attempt}; afterwards, `usual`.
      lag: latency of every reply, seconds.
      calls: every generation requested, alone or in a batch job, in order of arrival.
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
        """US dollars that the service charges, lost replies included."""
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


@contextlib.contextmanager
def teaching(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """`python -m sqa_jax.teach` in a process of its own, which does not outlive the block."""
    command = [sys.executable, "-m", "sqa_jax.teach", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, which must find the process alive."""
    assert process.poll() is None, process.communicate()
    process.kill()
    assert process.wait(30) == -signal.SIGKILL


def wait_for_handler(process: subprocess.Popen[str], number: int) -> None:
    """Waits until the process has handled a signal: `StopSignal` then restores the default action (Linux)."""

    def caught() -> bool:
        status = open(f"/proc/{process.pid}/status").read()
        match = re.search(r"SigCgt:\s*(\w+)", status)
        return bool(match and int(match[1], 16) & (1 << (number - 1)))

    wait_until(lambda: not caught())


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
