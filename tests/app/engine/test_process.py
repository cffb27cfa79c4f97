"""An engine at the other end of a socket: what it says first and last, how it ends, whom it outlives."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from app.engine import pulse
from app.engine.process import Exit, serve_in_thread
from app.engine.protocol import (
    AnyFromEngine,
    Cancel,
    Configure,
    DeviceLost,
    Drain,
    Heartbeat,
    Message,
    Pixels,
    Ready,
    Run,
    Unusable,
    from_engine,
)
from app.engine.transport import Transport
from app.errors import DeviceGone
from app.logs import make_logger
from app.schemas import GenerationRequest
from app.settings import Settings
from tests.app.fakes import NATIVE_SIZE, FakeRunner, decoded

ROOT = Path(__file__).parent.parent.parent.parent
CONFIGURE = Configure("fake", "cpu", "float32")
REQUEST = GenerationRequest(prompt="x", width=64, height=64, seeds=(3,))

Said = TypeVar("Said", bound=Message)


def run(job: str = "a", prompt: str = "x") -> Run:
    request = REQUEST.model_copy(update={"prompt": prompt})
    return Run(job, 0, 3, "", 0, None, 0.0, request.model_dump_json().encode())


class Parent(Transport[AnyFromEngine]):
    """The API process's end."""

    def wait_for(self, kind: type[Said]) -> Said:
        """The next message of a kind; those before it are passed over."""
        while (message := self.receive()) is not None:
            if isinstance(message, kind):
                return message
        raise AssertionError(f"the engine hung up without a {kind.__name__}")

    def wait_for_the_end(self) -> None:
        while self.receive() is not None:
            pass


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.02)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    here.settimeout(20)
    yield here, there
    here.close()
    there.close()


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    runner = FakeRunner()
    yield runner
    runner.gate.set()
    runner.loading.set()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def start(
    sockets: tuple[socket.socket, socket.socket], runner: FakeRunner, log: io.StringIO
) -> Iterator[Callable[[], tuple[Parent, Future[Exit]]]]:
    ends: list[Future[Exit]] = []
    parents: list[Parent] = []

    def start() -> tuple[Parent, Future[Exit]]:
        here, there = sockets
        ends.append(serve_in_thread(there, runner, logger=make_logger(Settings(log_format="json"), log)))
        parents.append(Parent(here, from_engine))
        return parents[0], ends[0]

    yield start
    runner.gate.set()
    runner.loading.set()
    for parent in parents:
        parent.close()
    for end in ends:
        end.result(10)


Start = Callable[[], tuple[Parent, Future[Exit]]]


def test_it_loads_works_and_drains(start: Start, runner: FakeRunner) -> None:
    parent, end = start()
    parent.send(CONFIGURE)
    ready = parent.wait_for(Ready)
    assert (ready.native_width, ready.native_height) == NATIVE_SIZE
    assert runner.configure == CONFIGURE
    parent.send(run())
    assert parent.wait_for(Pixels).pixels == decoded(REQUEST, 3).pixels
    parent.send(run("b"))
    parent.send(Drain())
    assert parent.wait_for(Pixels).job == "b"
    parent.wait_for_the_end()
    assert end.result(10) is Exit.DRAINED


def test_work_may_be_sent_while_it_loads(start: Start, runner: FakeRunner) -> None:
    runner.loading.clear()
    parent, _ = start()
    for message in (CONFIGURE, run("a"), run("b"), Cancel("a")):
        parent.send(message)
    runner.gate.clear()
    runner.loading.set()
    parent.wait_for(Ready)
    for _ in range(3):  # by then it has read what was sent before it was loaded
        parent.wait_for(Heartbeat)
    runner.gate.set()
    assert parent.wait_for(Pixels).job == "b"


def test_it_lives_while_it_loads(start: Start, runner: FakeRunner) -> None:
    runner.loading.clear()
    parent, _ = start()
    parent.send(CONFIGURE)
    assert parent.wait_for(Heartbeat).busy_seconds == 0


def test_a_model_that_cannot_be_loaded(start: Start, runner: FakeRunner, log: io.StringIO) -> None:
    runner.load_error = ValueError("no such file: model.safetensors")
    parent, end = start()
    parent.send(CONFIGURE)
    assert parent.wait_for(Unusable) == Unusable("no such file: model.safetensors")
    parent.wait_for_the_end()
    assert end.result(10) is Exit.UNUSABLE
    assert "no such file" in log.getvalue()


@pytest.mark.parametrize("while_loading", [True, False])
def test_a_lost_device(start: Start, runner: FakeRunner, while_loading: bool) -> None:
    parent, end = start()
    error = DeviceGone("CUDA error: unspecified launch failure")
    if while_loading:
        runner.load_error = error
    runner.broken["x"] = error
    parent.send(CONFIGURE)
    parent.send(run())
    assert parent.wait_for(DeviceLost).reason == "CUDA error: unspecified launch failure"
    parent.wait_for_the_end()
    assert end.result(10) is Exit.DEVICE_LOST


def test_a_crash_hangs_up_without_a_word(start: Start, runner: FakeRunner) -> None:
    runner.deadly.add("x")
    parent, end = start()
    parent.send(CONFIGURE)
    parent.wait_for(Ready)
    parent.send(run())
    parent.wait_for_the_end()
    assert end.result(10) is Exit.CRASHED


def test_an_injected_error_is_a_crash(start: Start, log: io.StringIO) -> None:
    parent, end = start()
    parent.send(Configure("fake", "cpu", "float32", faults=("engine_before_step:raise@2",)))
    parent.wait_for(Ready)
    parent.send(run())
    parent.wait_for_the_end()
    assert end.result(10) is Exit.CRASHED
    assert "engine_before_step" in log.getvalue()


def test_the_first_message_must_be_the_configuration(start: Start) -> None:
    parent, end = start()
    parent.send(Drain())
    parent.wait_for_the_end()
    assert end.result(10) is Exit.CRASHED


def test_a_hang_is_seen_from_outside(start: Start, runner: FakeRunner) -> None:
    parent, _ = start()
    parent.send(CONFIGURE)
    parent.wait_for(Ready)
    runner.gate.clear()
    parent.send(run())
    beat = parent.wait_for(Heartbeat)
    while beat.num_samples == 0:
        beat = parent.wait_for(Heartbeat)
    assert 0 < beat.busy_seconds < 20
    assert beat.predicted_seconds > 0


@pytest.mark.parametrize("noise", [b"\x00\x00\x00\x01\xc1", b"\xff\xff\xff\xff"])
def test_noise_ends_it(
    start: Start, sockets: tuple[socket.socket, socket.socket], noise: bytes, log: io.StringIO
) -> None:
    parent, end = start()
    parent.send(CONFIGURE)
    parent.wait_for(Ready)
    sockets[0].sendall(noise)
    parent.wait_for_the_end()
    end.result(10)
    assert "not a message" in log.getvalue()


CHILD = """
import socket, sys
from app.engine import pulse
from app.engine.process import be_engine
from app.logs import make_logger
from app.settings import Settings
from tests.app.fakes import FakeRunner

pulse.BEAT_SECONDS = 0.02
runner = FakeRunner()
runner.gate.clear()
be_engine(socket.socket(fileno=int(sys.argv[1])), runner, make_logger(Settings()))
"""


def test_a_process_heeds_no_signals_and_never_outlives_its_parent(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    here, there = sockets
    command = [sys.executable, "-c", CHILD, str(there.fileno())]
    with subprocess.Popen(command, pass_fds=[there.fileno()], cwd=ROOT) as child:
        there.close()
        parent = Parent(here, from_engine)
        parent.send(CONFIGURE)
        parent.send(run())
        while not parent.wait_for(Heartbeat).busy_seconds:
            pass
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGTERM)
        parent.wait_for(Heartbeat)  # in the middle of a step that will not end
        closed_at = time.monotonic()
        parent.close()
        assert child.wait(10) == Exit.CRASHED
        assert time.monotonic() - closed_at < 1


@pytest.mark.slow  # imports torch
def test_the_module_is_the_process(sockets: tuple[socket.socket, socket.socket]) -> None:
    here, there = sockets
    command = [sys.executable, "-m", "app.engine.process", "--socket-fd", str(there.fileno())]
    environment = {**os.environ, "CASCADE_HOST": "0.0.0.0", "CASCADE_MAX_QUEUE": "?"}  # the server's affair
    with subprocess.Popen(
        command, pass_fds=[there.fileno()], cwd=ROOT, stderr=subprocess.PIPE, env=environment
    ) as child:
        there.close()
        parent = Parent(here, from_engine)
        here.settimeout(120)
        parent.send(Configure("/nowhere", "cpu", "float32"))
        assert "/nowhere" in parent.wait_for(Unusable).reason
        assert child.wait(20) == Exit.UNUSABLE
        assert child.stderr is not None
        log = child.stderr.read()
        assert b"Traceback" not in log, (
            "the server logs the reason; where in the code it came up helps nobody"
        )
