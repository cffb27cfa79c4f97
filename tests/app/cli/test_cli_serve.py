"""`cascade serve`: how it refuses to start, and how it stops."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import httpx2
import pytest

from app.cli_serve import listen
from tests.app.cli.running import Run

PATH = "/v1/images/generations"


def test_a_busy_port_is_one_line(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        outcome = run("serve", "--port", port, "--data-dir", tmp_path / "data")
    assert outcome.status == 2
    assert outcome.err == (
        f"cascade: 127.0.0.1:{port} is already in use; choose another with --host and --port\n"
    )


def test_a_model_that_cannot_be_loaded_stops_the_server(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    outcome = run("serve", "--port", 0, "--data-dir", data, "--model", tmp_path / "nothing")
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("cascade: ")
    assert str(tmp_path / "nothing") in last


def test_a_start_that_fails_leaves_the_pictures_of_an_earlier_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "secret").write_text("0" * 64)
    assert run("serve", "--port", 0, "--data-dir", tmp_path, "--model", tmp_path / "nothing").status == 2
    assert {"files", "secret"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "secret").read_text() == "0" * 64


def test_a_public_address_needs_a_key_or_a_word(run: Run, tmp_path: Path) -> None:
    outcome = run("serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", tmp_path / "data")
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert "CASCADE_API_KEYS" in line
    assert "--allow-anonymous (CASCADE_ALLOW_ANONYMOUS=true)" in line


def test_a_wrong_setting_of_the_server_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_PROT", "9000")
    outcome = run("serve", "--port", "0")
    assert outcome.status == 2
    assert outcome.err == "cascade: CASCADE_PROT is no setting; did you mean CASCADE_PORT?\n"
    monkeypatch.delenv("CASCADE_PROT")
    monkeypatch.setenv("CASCADE_MAX_QUEUE", "-1")
    outcome = run("serve", "--port", "70000")
    assert [line.split(": ")[:2] for line in outcome.err.splitlines()] == [
        ["cascade", "--port"],
        ["cascade", "CASCADE_MAX_QUEUE"],
    ]


@pytest.mark.anyio
async def test_answers_leave_at_once() -> None:
    """Without this option a short answer waits 40 ms for an acknowledgement of its head."""
    accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(writer)

    with listen("127.0.0.1", 0) as listener:
        async with await asyncio.start_server(connected, sock=listener):
            with socket.create_connection(listener.getsockname()):
                writer = await accepted.get()
                connection = writer.get_extra_info("socket")
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                await writer.wait_closed()


def test_an_unknown_host_is_one_line_that_names_it(run: Run, tmp_path: Path) -> None:
    host = "no-such-host.invalid"
    data = tmp_path / "data"
    outcome = run("serve", "--host", host, "--port", 0, "--data-dir", data, "--allow-anonymous")
    assert (outcome.status, outcome.err) == (
        2,
        f"cascade: the host {host!r} is not known here; choose an address with --host\n",
    )


def test_a_damaged_secret_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    outcome = run("serve", "--port", 0, "--data-dir", tmp_path)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith(f"cascade: {tmp_path / 'secret'} holds no secret")
    assert "Traceback" not in outcome.err


# A server whose model makes no step before a file called `go` appears in its folder.
HELD_SERVER = """
import functools, gc, pathlib, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
import app.cli, app.main
from tests.app.fakes import FakeRunner

runner = FakeRunner()
runner.max_samples = 1
runner.gate.clear()

def hold():
    folder = pathlib.Path(sys.argv[-1])
    while not (folder / "go").exists():
        time.sleep(0.01)
    (folder / "kept").write_text(f"{gc.get_freeze_count()} {len(gc.get_objects())}")
    runner.gate.set()

threading.Thread(target=hold, daemon=True).start()
app.main.create_app = functools.partial(app.main.create_app, runner=runner)
app.cli.main()
"""


class Held:
    """That server, with one job on its engine and callers who wait."""

    def __init__(self, folder: Path, grace_seconds: float) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-c",
            HELD_SERVER,
            "serve",
            "--port",
            str(self.port),
            "--data-dir",
            str(folder),
        ]
        environment = {**os.environ, "CASCADE_GRACE_SECONDS": str(grace_seconds)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def __enter__(self) -> Self:
        wait_until(lambda: is_ready(self.client))
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def figures(self) -> str:
        return self.client.get("/metrics").text

    def wait(self) -> tuple[int, str]:
        """The exit status and the log."""
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_stops_answers_all_who_wait_and_keeps_their_jobs(tmp_path: Path, number: int) -> None:
    with Held(tmp_path, grace_seconds=1) as server, ThreadPoolExecutor(3) as pool:
        visits = [pool.submit(server.client.post, PATH, json={"prompt": "x"}) for _ in range(3)]
        wait_until(lambda: "queue_jobs 2.0" in server.figures())
        server.process.send_signal(number)
        answers = [visit.result() for visit in visits]
        status, log = server.wait()
    assert "Traceback" not in log
    assert [json.loads(line)["event"] for line in (log.splitlines()[0], log.splitlines()[-1])] == [
        "loading",
        "stopped",
    ]
    for answer in answers:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert "about to stop" in answer.json()["error"]["message"]
    assert status == (0 if number == signal.SIGTERM else 130)
    with Held(tmp_path, grace_seconds=1) as again:
        assert again.client.get("/api/v1/queue").json()["queued"] >= 2
        (tmp_path / "go").touch()
        wait_until(lambda: again.client.get("/api/v1/jobs?status=succeeded").text.count('"succeeded"') >= 3)


def test_what_start_up_made_is_not_looked_at_for_garbage_again(tmp_path: Path) -> None:
    with Held(tmp_path, grace_seconds=1) as server:
        (tmp_path / "go").touch()
        assert server.client.post(PATH, json={"prompt": "x"}).status_code == 200
    num_frozen, num_watched = map(int, (tmp_path / "kept").read_text().split())
    assert num_frozen > 5 * num_watched


def test_what_is_in_work_is_finished_while_others_are_refused(tmp_path: Path) -> None:
    with Held(tmp_path, grace_seconds=25) as server, ThreadPoolExecutor(2) as pool:
        working = pool.submit(server.client.post, PATH, json={"prompt": "x"})
        wait_until(lambda: "running_jobs 1.0" in server.figures())
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode())
            wait_until(lambda: server.client.get("/healthz").status_code == 200)
            server.process.terminate()
            assert half.recv(100).startswith(b"HTTP/1.1 503")
        assert server.client.get("/readyz").status_code == 503
        refused = server.client.post(PATH, json={"prompt": "y"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.headers["connection"] == "close"
        assert server.client.get("/healthz").status_code == 200
        (tmp_path / "go").touch()
        assert working.result().status_code == 200
        status, log = server.wait()
    assert (status, "Traceback" in log) == (0, False)


def test_a_request_that_is_on_its_way_when_the_door_closes_is_answered(tmp_path: Path) -> None:
    with Held(tmp_path, grace_seconds=1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as early:
            server.process.terminate()
            wait_until(lambda: not is_open(server.port))
            early.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert early.recv(100).startswith(b"HTTP/1.1 200")
        assert server.wait()[0] == 0


def is_open(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)):
            return True
    except ConnectionRefusedError:
        return False


def test_noise_on_the_line_is_one_line_of_json(tmp_path: Path) -> None:
    with Held(tmp_path, grace_seconds=1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as noise:
            noise.sendall(b"\x16\x03\x01 what?\r\n\r\n")
            assert noise.recv(100).startswith(b"HTTP/1.1 400")
        server.process.terminate()
        _, log = server.wait()
    [line] = [json.loads(line) for line in log.splitlines() if "Invalid HTTP" in line]
    assert line["level"] == "warning"


def test_a_server_takes_all_the_descriptors_that_it_may_have(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))  # which a child inherits
    try:
        server = Held(tmp_path, grace_seconds=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with server:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (before[1], before[1])


def is_ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
