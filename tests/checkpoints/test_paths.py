"""What a student's path may mean, and a hub of our own to fetch one from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer, load_tokenizer
from sqa_jax.checkpoints.weights import save_safetensors
from sqa_jax.errors import UserError


def refused(path: str, *words: str) -> None:
    """Neither the student nor, but for random weights, its tokenizer loads; one line has each of `words`."""
    for load in (load_student,) if path.startswith("random:") else (load_student, load_tokenizer):
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message


def test_paths_that_lead_nowhere(tmp_path):
    refused("", "config.student.path is empty")
    refused(str(tmp_path / "nothing"), "no such model directory")
    refused("./nothing", "no such model directory")
    refused(str(tmp_path / "absent.gguf"), "absent.gguf: not found", "bash launch/fetch_student.sh")
    (tmp_path / "model.bin").write_text("weights")
    refused(str(tmp_path / "model.bin"), "not a .gguf file", "give the directory")
    refused("random:huge", "tiny, small")
    refused(f"random:{tmp_path}", f"{tmp_path}/config.json: not found")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as fetching one repository, own/er, takes."""

    directory: Path
    fetched: list[str]
    commit = "0" * 39 + "1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/own/er"):
            if "/absent" in path:
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if "/tree/" in path:
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "1"}
                    for f in self.directory.iterdir()
                ]
                return self.reply(200, json.dumps(files).encode())
            names = [{"rfilename": f.name} for f in self.directory.iterdir()]
            return self.reply(200, json.dumps({"id": "own/er", "sha": self.commit, "siblings": names}).encode())
        if path.startswith("/own/er/resolve/"):
            file = self.directory / path.rsplit("/", 1)[1]
            if self.command == "GET":
                self.fetched.append(file.name)
            return self.reply(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": self.commit})
        return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


HUB_CLIENT = """
from sqa_jax.errors import UserError
from sqa_jax.checkpoints.paths import locate
for path, revision in (("own/er", ""), ("own/er", "absent"), ("own/absent", "")):
    try:
        print(locate(path, revision))
    except UserError as error:
        print("error", error)
"""


def shard(directory: Path) -> None:
    """Deals the tensors of model.safetensors to two files and an index."""
    whole = directory / "model.safetensors"
    tensors = sorted(load_file(whole).items())
    whole.unlink()
    listed = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(dict(part), directory / file)
        listed |= {name: file for name, _ in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_hub(tmp_path, tiny_student):
    model = tmp_path / "model"
    save_safetensors(tiny_student.params, tiny_student.config, model)
    byte_tokenizer().save_pretrained(model)
    shard(model)
    wanted = {file.name for file in model.iterdir()}
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (model / unwanted).write_text("not needed")
    Hub.directory, Hub.fetched = model, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def client(**more):
        command = [sys.executable, "-c", HUB_CLIENT]
        run = subprocess.run(
            command, env=os.environ | endpoint | more, capture_output=True, text=True, timeout=120, check=True
        )
        return run.stdout.splitlines()

    found, absent_revision, absent = client()
    server.shutdown()
    server.server_close()
    assert sorted(Hub.fetched) == sorted(wanted)
    assert load_student(found).fingerprint == load_student(str(model)).fingerprint
    assert absent_revision.startswith("error own/er: ") and "revision absent" in absent_revision
    assert absent.startswith("error own/absent: neither a directory here nor on the hub")

    again, _, absent = client(HF_HUB_OFFLINE="1")
    assert again == found  # what was fetched before needs no connection
    assert "the hub cannot be reached" in absent and "give its directory" in absent
