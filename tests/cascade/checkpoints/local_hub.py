"""A small hub on this machine that speaks what the Hugging Face library asks of the real one."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Repository:
    """Files at one commit; `branches` point to it."""

    folder: Path
    commit: str = "a" * 40
    branches: tuple[str, ...] = ("main",)
    token: str | None = None

    @property
    def names(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in files)

    def describe(self, name: str) -> dict[str, object]:
        content = (self.folder / name).read_bytes()
        entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return entry


@dataclass
class Hub:
    """The server's state: what it offers, how it misbehaves, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    cut_after: int | None = None  # bytes of the next long answer, before the line goes dead
    spoiled: bytes = b""  # written over the beginning of safetensors files

    @property
    def downloads(self) -> list[str]:
        """The files whose bytes were asked for, as commit/name."""
        asked = [line.removeprefix("GET ") for line in self.requests if line.startswith("GET ")]
        return [line.split("/resolve/")[1] for line in asked if "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Silent."""

    def _answer(self, *, with_body: bool) -> None:
        hub = self.server.hub
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.tokens.add(token)
        asked = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(?:revision|resolve)/([^/]+)(?:/(.+))?", path)
        repository = hub.repositories.get(asked[1]) if asked else None
        if not asked or repository is None:
            return self._fail(404, "RepoNotFound")
        if repository.token and token != repository.token:
            return self._fail(403, "GatedRepo")
        if asked[2] not in (*repository.branches, repository.commit):
            return self._fail(404, "RevisionNotFound")
        if asked[3] is None:
            siblings = [repository.describe(name) for name in repository.names]
            content = json.dumps({"id": asked[1], "sha": repository.commit, "siblings": siblings}).encode()
            return self._send(content, {"Content-Type": "application/json"}, with_body=with_body)
        return self._send_file(repository, asked[3], with_body=with_body)

    def _send_file(self, repository: Repository, name: str, *, with_body: bool) -> None:
        content = (repository.folder / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if name.endswith(".safetensors"):
            content = self.server.hub.spoiled + content[len(self.server.hub.spoiled) :]
        self._send(content, headers, with_body=with_body)

    def _send(self, content: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        hub, status, total = self.server.hub, 200, len(content)
        if with_body and (asked := self.headers.get("Range")):
            hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and hub.cut_after is not None and len(content) > hub.cut_after:
            content, hub.cut_after = content[: hub.cut_after], None
            self.close_connection = True
        if with_body:
            self.wfile.write(content)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """Serve while the block runs; `hub.endpoint` is the address."""
    with _Server(hub) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
