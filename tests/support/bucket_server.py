"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs, google-cloud-storage and tensorstore use."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any


class BucketServer:
    """Serves buckets in memory, on a free port while entered.

    Attributes:
      buckets: {bucket: {name: (generation, content)}}.
      refuse: called with (method, name of the object or "" for the bucket itself); an HTTP status refuses the request.
      requests: (method, name) of every request that came.
    """

    # As the service words them.
    WORDS = {
        401: "Anonymous caller does not have storage.objects.create access to the Google Cloud Storage object.",
        403: "a@b.iam.gserviceaccount.com does not have storage.objects.create access to the Google Cloud Storage object.",
        404: "The specified bucket does not exist.",
        503: "We encountered an internal error. Please try again.",
    }

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {}
        self.refuse: Callable[[str, str], int | None] = lambda method, name: None
        self.requests: list[tuple[str, str]] = []
        self.uploads: dict[str, tuple[str, str, bytes]] = {}  # resumable ones under way: bucket, name, what came so far
        self.generations = itertools.count(1)
        self.lock = threading.RLock()

    def __enter__(self) -> BucketServer:
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"store": self}))
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def put(self, bucket: str, name: str, content: bytes) -> dict[str, Any]:
        self.buckets[bucket][name] = (next(self.generations), content)
        return self.described(bucket, name)

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        generation, content = self.buckets[bucket][name]
        return {
            "kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(content)), "generation": str(generation),
            "metageneration": "1", "timeCreated": "2020-01-01T00:00:00.000Z", "updated": "2020-01-01T00:00:00.000Z",
        }  # fmt: skip

    def listed(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.buckets[bucket]):
            if name.startswith(prefix):
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if found:
                    prefixes.add(prefix + head + found)
                else:
                    items.append(self.described(bucket, name))
        most = int(query.get("maxResults", 10**6))
        return {"kind": "storage#objects", "items": items[:most], "prefixes": sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as by the service
    wbufsize = -1  # a reply is one packet
    store: BucketServer

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # gcsfs asks two questions at once and hangs up on the slower answer
            super().handle()

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(query))
        match = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?/?", path)
        bucket, name = (urllib.parse.unquote(part or "") for part in match.groups())
        multipart = query.get("uploadType") == "multipart"
        if multipart:
            name, body = _parts(self.headers["Content-Type"], body)
        name = name or query.get("name", "")
        with self.store.lock:
            self.store.requests.append((self.command, name))
            status = self.store.refuse(self.command, name) or (404 if bucket not in self.store.buckets else None)
            if status:
                self._send({"error": {"code": status, "message": self.store.WORDS[status]}}, status)
            elif self.command == "DELETE":
                self._send(b"", 204 if self.store.buckets[bucket].pop(name, None) else 404)
            elif self.command in ("POST", "PUT"):
                self._upload(bucket, name, body, query)
            elif not name:
                about = {"kind": "storage#bucket", "name": bucket}
                self._send(self.store.listed(bucket, query) if path.endswith("/o") else about)
            elif name not in self.store.buckets[bucket]:
                self._send({"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}, 404)
            elif query.get("alt") == "media":
                self._content(*self.store.buckets[bucket][name], query)
            else:
                self._send(self.store.described(bucket, name))

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def _upload(self, bucket: str, name: str, body: bytes, query: dict[str, str]) -> None:
        expected, there = query.get("ifGenerationMatch"), self.store.buckets[bucket].get(name, (0,))[0]
        if expected is not None and int(expected) != there:
            self._send({"error": {"code": 412, "message": "generation does not match"}}, 412)
        elif query.get("uploadType") == "resumable" and "upload_id" not in query:
            upload = f"{len(self.store.uploads)}"
            self.store.uploads[upload] = (bucket, name, b"")
            location = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
            self._send({}, headers={"Location": location})
        elif "upload_id" in query:
            bucket, name, before = self.store.uploads[query["upload_id"]]
            self.store.uploads[query["upload_id"]] = (bucket, name, content := before + body)
            if self.headers["Content-Range"].endswith("/*"):
                self._send(b"", 308, {"Range": f"bytes=0-{len(content) - 1}"})
            else:
                self._send(self.store.put(bucket, name, content))
        else:
            self._send(self.store.put(bucket, name, body))

    def _content(self, generation: int, content: bytes, query: dict[str, str]) -> None:
        headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(content))}
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._send(b"", 304, headers)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            if first >= len(content):
                return self._send(b"", 416)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(content[first : last + 1], 206, headers)
        return self._send(content, 200, headers)

    def _send(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(b"" if status in (204, 304) else content)


def _parts(kind: str, body: bytes) -> tuple[str, bytes]:
    """(name, content) of an upload whose first part describes the object and whose second is its content."""
    boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
    described, content = (part for part in body.split(b"--" + boundary)[1:3])
    name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
    content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
    return name, re.sub(rb"\r?\n\Z", b"", content)
