"""`cascade serve`: how it refuses to start, and how it stops."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

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
    assert not data.exists(), "a start that failed leaves no new folder"


def test_a_start_that_fails_leaves_the_pictures_of_an_earlier_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "secret").write_text("0" * 64)
    assert run("serve", "--port", 0, "--data-dir", tmp_path, "--model", tmp_path / "nothing").status == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "secret"]


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


# A server whose model never ends a step, with little patience.
STUCK_SERVER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
import app.main, app.cli, app.cli_serve
from tests.app.fakes import FakeRunner

runner = FakeRunner()
runner.gate.clear()
app.main.CascadeRunner = lambda *_: runner
app.main.STOP_SECONDS = 0.1
app.cli_serve.GRACE_SECONDS, app.cli_serve.ANSWER_SECONDS = 3, 2
app.cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_stops_answers_all_who_wait(tmp_path: Path, number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", STUCK_SERVER, "serve", "--port", str(port), "--data-dir", str(tmp_path)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        wait_until(lambda: is_ready(client))
        visits = [pool.submit(client.post, PATH, json={"prompt": "x"}) for _ in range(3)]
        wait_until(lambda: "queue_jobs 2.0" in client.get("/metrics").text)
        server.send_signal(number)
        answers = [visit.result() for visit in visits]
        _, log = server.communicate(timeout=10)
    assert "Traceback" not in log
    assert [json.loads(line)["event"] for line in (log.splitlines()[0], log.splitlines()[-1])] == [
        "loading",
        "stopped",
    ]
    for answer in answers:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["message"] == "the server is stopping"
    assert server.returncode == (0 if number == signal.SIGTERM else 130)


def is_ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx2.ConnectError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
