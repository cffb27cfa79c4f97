"""Five hundred slow clients at once, of each kind, against a server that has 1024 descriptors."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.server_process import ServerProcess, ending

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

NUM_SLOW = 500
NUM_VISITS = 60
NOISE_SECONDS = 0.5  # what a good client waits now and then on a busy machine, whoever else is there
PICTURE = {"prompt": "x", "seed": 1, "width": 768, "height": 768}  # 1.8 MB of noise
IN_FLIGHT = 2**18  # bytes of an answer that are in memory for one who does not read

SERVER = """
import dataclasses, functools, random, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
import app.cli, app.main
from tests.app import fakes

plain = fakes.decoded

def noise(request, seed):
    made = plain(request, seed)
    return dataclasses.replace(made, pixels=random.Random(seed).randbytes(len(made.pixels)))

fakes.decoded = noise
app.main.create_app = functools.partial(app.main.create_app, runner=fakes.FakeRunner())
app.cli.main()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    words = ["-c", SERVER, "serve", "--port", "{port}", "--data-dir", str(tmp_path / "data")]
    environment = {"CASCADE_LOG_FORMAT": "json", "CASCADE_BODY_TIMEOUT": "15"}
    with ending(ServerProcess(words, tmp_path / "log", environment)) as server:
        server.start()
        yield server


@pytest.mark.parametrize(
    ("kind", "patience_seconds"), [("head", 10.0), ("body", 15.0), ("file", 30.0), ("json", 30.0)]
)
async def test_five_hundred_slow_clients_hurt_only_themselves(
    server: ServerProcess, kind: str, patience_seconds: float
) -> None:
    await server.until_ready()
    process = psutil.Process(server.pid)
    sent = await asyncio.to_thread(opening, server, kind)
    usual_seconds, num_before = await asyncio.to_thread(visits, server), process.num_fds()
    memory_before = process.memory_info().rss
    with ExitStack() as stack:
        started = time.monotonic()
        slow = [stack.enter_context(socket.socket()) for _ in range(NUM_SLOW)]
        for client in slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.to_thread(client.connect, ("127.0.0.1", server.port))
            client.sendall(sent)
        await asyncio.sleep(5)
        assert NUM_SLOW <= process.num_fds() - num_before < NUM_SLOW + 20
        assert process.memory_info().rss - memory_before < NUM_SLOW * IN_FLIGHT + 100_000_000
        assert await asyncio.to_thread(visits, server) <= max(2 * usual_seconds, NOISE_SECONDS)
        while process.num_fds() > num_before + 2:
            assert time.monotonic() - started < 2 * patience_seconds + 15
            await asyncio.sleep(0.5)
    assert time.monotonic() - started > patience_seconds * 0.8
    async with httpx2.AsyncClient(base_url=server.url, timeout=20) as good:
        assert (await good.post("/api/v1/images", json={**PICTURE, "seed": 2})).status_code == 200
    for line in server.log.read_text().splitlines():
        json.loads(line)


def opening(server: ServerProcess, kind: str) -> bytes:
    """What a slow client sends before it dawdles."""
    if kind == "head":
        return b"GET / HTTP/1.1\r\nHost: x\r\nSlow: "
    post = b"POST /api/v1/images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if kind == "body":
        return post + b"Content-Length: 100000\r\n\r\n{"
    with httpx2.Client(base_url=server.url, timeout=20) as client:
        made = client.post(
            "/api/v1/images", json={**PICTURE, "response_format": "url"}, headers={"Idempotency-Key": "url"}
        ).json()["images"][0]
        if kind == "file":
            return f"GET {made['url'].removeprefix(server.url)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        client.post("/api/v1/images", json=PICTURE, headers={"Idempotency-Key": "json"})
        body = json.dumps(PICTURE).encode()
        return post + b"Idempotency-Key: json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def visits(server: ServerProcess) -> float:
    """The 99th percentile of the seconds that a good client waits."""
    seconds = []
    for _ in range(NUM_VISITS):
        start = time.monotonic()
        with httpx2.Client(base_url=server.url, timeout=10) as client:
            assert client.get("/healthz").status_code == 200
        seconds.append(time.monotonic() - start)
    return sorted(seconds)[int(NUM_VISITS * 0.99) - 1]
