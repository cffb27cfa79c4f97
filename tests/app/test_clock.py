"""A clock that is set loses nothing: no job, no picture, no key."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from app.clock import SLEW, SteadyClock, seconds_since_boot
from tests.app.conftest import Serve, eventually
from tests.app.fakes import FakeRunner, closed, until

HOUR, DAY = 3600.0, 86_400.0
IMAGES = "/api/v1/images"


class Machine:
    """The clocks of a machine."""

    def __init__(self) -> None:
        self.time, self.passed = 1_700_000_000.0, 77.0

    def let_pass(self, seconds: float) -> None:
        self.time += seconds
        self.passed += seconds

    def steady(self) -> SteadyClock:
        return SteadyClock(lambda: self.time, lambda: self.passed)


def test_it_is_the_time_of_day() -> None:
    machine = Machine()
    clock = machine.steady()
    assert clock() == machine.time
    machine.let_pass(5 * DAY)
    assert clock() == machine.time


@pytest.mark.parametrize("jump", [HOUR, -HOUR, DAY, -DAY])
def test_a_jump_is_made_up_for_little_by_little(jump: float) -> None:
    machine = Machine()
    clock = machine.steady()
    machine.time += jump
    before = clock()
    assert before == machine.time - jump
    machine.let_pass(600)
    assert clock() - before == pytest.approx(600 * (1 + SLEW) if jump > 0 else 600 * (1 - SLEW))
    told = [clock()]
    for _ in range(25 * 24):
        machine.let_pass(HOUR)
        told.append(clock())
    assert told == sorted(told)
    assert told[-1] == machine.time
    machine.let_pass(HOUR)
    assert clock() == machine.time


def test_it_goes_on_while_the_machine_sleeps() -> None:
    assert abs(seconds_since_boot() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the system, as this process sees it."""
    real, jumped = time.time, 0.0

    def set_clock(seconds: float) -> None:
        nonlocal jumped
        jumped = seconds

    monkeypatch.setattr(time, "time", lambda: real() + jumped)
    monkeypatch.setattr("app.jobs.housekeeping.ROUND_SECONDS", 0.01)
    return set_clock


@pytest.mark.anyio
@pytest.mark.parametrize("jump", [HOUR, -HOUR, 1.5 * DAY, -1.5 * DAY])
async def test_a_server_whose_clock_is_set_forgets_nothing(
    serve: Serve,
    runner: FakeRunner,
    set_clock: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    jump: float,
) -> None:
    runner.max_samples = 1
    async with serve() as client:
        headers = {"prefer": "respond-async", "idempotency-key": "one"}
        done = (await client.post(IMAGES, json={"prompt": "done"}, headers=headers)).json()
        await eventually(lambda: status_is(client, done, "succeeded"))
        url = (await client.get(done["urls"]["self"])).json()["images"][0]["url"]
        with closed(runner.gate):
            headers = {"prefer": "respond-async"}
            body = {"prompt": "running", "deadline_seconds": 600}
            running = (await client.post(IMAGES, json=body, headers=headers)).json()
            await until(lambda: len(runner.started) == 2)
            waiting = (await client.post(IMAGES, json=body, headers=headers)).json()
            set_clock(jump)
            await let_it_tidy(monkeypatch)
            assert await status_is(client, done, "succeeded")
            assert await status_is(client, running, "running")
            assert await status_is(client, waiting, "queued")
        for job in (running, waiting):
            await eventually(lambda job=job: status_is(client, job, "succeeded"))  # type: ignore[misc]
        await let_it_tidy(monkeypatch)
        [made] = (await client.get(running["urls"]["self"])).json()["images"]
        for one in (url, made["url"]):
            assert (await client.get(one)).status_code == 200
        again = await client.post(
            IMAGES, json={"prompt": "done"}, headers={"prefer": "respond-async", "idempotency-key": "one"}
        )
        assert (again.json()["id"], again.headers["idempotency-replayed"]) == (done["id"], "true")


async def status_is(client: httpx2.AsyncClient, job: dict[str, dict[str, str]], status: str) -> bool:
    found = await client.get(job["urls"]["self"])
    return found.status_code == 200 and bool(found.json()["status"] == status)


async def let_it_tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait until the server has looked for old things twice."""
    scans, scandir = 0, os.scandir

    def counting(*args: object) -> object:
        nonlocal scans
        scans += 1
        return scandir(*args)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", counting)
        await until(lambda: scans >= 2)
