"""What a service manager hears, on a socket of our own."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli_systemd import ServiceManager

PID = 4711


@pytest.fixture(params=["path", "abstract"])
def letterbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket as systemd has one, and its name in NOTIFY_SOCKET."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@cascade-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address.replace("@", "\0") if request.param == "abstract" else address)
        listening.settimeout(5)
        yield listening, address


def heard(listening: socket.socket) -> list[str]:
    return listening.recv(1000).decode().splitlines()


def test_the_manager_hears_of_every_change(letterbox: tuple[socket.socket, str]) -> None:
    listening, address = letterbox
    manager = ServiceManager.of_environment({"NOTIFY_SOCKET": address}, PID)
    manager.starting("loading tiny")
    manager.ready("serving on 127.0.0.1:8000")
    manager.stopping("2 pictures to finish")
    assert heard(listening) == ["STATUS=loading tiny"]
    assert heard(listening) == ["READY=1", "STATUS=serving on 127.0.0.1:8000"]
    assert heard(listening) == ["STOPPING=1", "STATUS=2 pictures to finish"]


@pytest.mark.anyio
async def test_the_watchdog_is_fed_twice_in_its_time(letterbox: tuple[socket.socket, str]) -> None:
    listening, address = letterbox
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000", "WATCHDOG_PID": str(PID)}
    feeding = asyncio.create_task(ServiceManager.of_environment(environment, PID).keep_alive())
    for _ in range(3):
        assert await asyncio.to_thread(heard, listening) == ["WATCHDOG=1"]
    feeding.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "a while"},
        {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": "1"},  # meant for another process
    ],
)
async def test_without_a_watchdog_nothing_is_fed(environment: dict[str, str]) -> None:
    await asyncio.wait_for(ServiceManager.of_environment(environment, PID).keep_alive(), 5)


def test_without_a_manager_and_after_its_end_nothing_happens(tmp_path: Path) -> None:
    ServiceManager.of_environment({}, PID).ready("x")
    ServiceManager(str(tmp_path / "nobody")).ready("x")
