"""`cascade health` against small servers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.app.cli.running import Run


@contextmanager
def server(**answers: int) -> Iterator[int]:
    """A server on a free port that gives `/name` the status `answers[name]`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers[self.path[1:]])
            self.end_headers()
            self.wfile.write(b'{"status":"as asked"}\nmore')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


def test_a_server_that_lives_is_well_although_it_is_not_ready(run: Run) -> None:
    with server(healthz=200, readyz=503) as port:
        alive = run("health", "--port", port)
        ready = run("health", "--port", port, "--ready")
    assert (alive.status, alive.out) == (0, '200 {"status":"as asked"}\n')
    assert (ready.status, ready.out) == (1, '503 {"status":"as asked"}\n')


def test_nobody_there_is_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    outcome = run("health", "--port", port)
    assert outcome.status == 1
    assert outcome.out.startswith(f"no answer from 127.0.0.1:{port}: ")


def test_the_settings_say_where_to_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(healthz=200) as port:
        monkeypatch.setenv("CASCADE_HOST", "0.0.0.0")
        monkeypatch.setenv("CASCADE_ALLOW_ANONYMOUS", "true")
        monkeypatch.setenv("CASCADE_PORT", str(port))
        assert run("health").status == 0


def test_something_that_speaks_no_http_is_not_well(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def shut_the_door() -> None:
            visitor, _ = other.accept()
            visitor.sendall(b"SSH-2.0-x\r\n")
            visitor.close()

        thread = threading.Thread(target=shut_the_door)
        thread.start()
        outcome = run("health", "--port", port)
        thread.join()
    assert outcome.status == 1
    assert "no answer" in outcome.out
