"""Engines that start, work, die, hang and come again, on a clock that waits for nobody."""

import asyncio
import io
import os
import signal
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from app.engine.protocol import (
    AnyFromEngine,
    Configure,
    DeviceLost,
    Drain,
    Heartbeat,
    Observation,
    Progressed,
    Ready,
    Run,
    Stepped,
    Unusable,
)
from app.jobs.links import Link, ProcessLauncher
from app.jobs.supervisor import EngineState, Patience, Supervisor
from app.logs import make_logger
from app.metrics import Metrics
from app.settings import Settings, engine_environment
from tests.app.jobs.links import IDLE, FakeLink
from tests.app.jobs.servers import usual_settings
from tests.app.jobs.virtual_time import BACKEND

pytestmark = pytest.mark.anyio

CONFIGURE = Configure(model="tiny", device="cpu", dtype="float32")
READY = Ready("cpu", "float32", 64, 64, 100, {})
STEPPED = Progressed((Stepped("job", 0, "prior", 1, 20, 1.0),))


@pytest.fixture
def anyio_backend() -> object:
    return BACKEND


class Scene:
    """A supervisor, the engines that it started, and what its listener was told, with the time."""

    def __init__(self) -> None:
        self.links: list[FakeLink] = []
        self.told: list[tuple[float, str | AnyFromEngine]] = []
        self.launches: list[float] = []
        self.refusals: list[OSError] = []
        self.is_starting_slowly = False
        self.slow: asyncio.Event | None = None  # holds the listener up
        self.surprise: Exception | None = None
        self.metrics = Metrics()
        logger = make_logger(usual_settings(), io.StringIO())
        self.supervisor = Supervisor(self._launch, CONFIGURE, metrics=self.metrics, logger=logger)

    async def _launch(self) -> Link:
        self.launches.append(self.now)
        if self.is_starting_slowly:
            await asyncio.sleep(1)
        if self.refusals:
            raise self.refusals.pop()
        self.links.append(FakeLink())
        return self.links[-1]

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def engine(self) -> FakeLink:
        return self.links[-1]

    @property
    def words(self) -> list[str | AnyFromEngine]:
        return [what for _, what in self.told]

    async def engine_ready(self, engine: Supervisor) -> None:
        assert engine is self.supervisor
        assert engine.is_ready
        self.told.append((self.now, "ready"))

    async def engine_said(self, engine: Supervisor, message: AnyFromEngine) -> None:
        if self.surprise is not None:
            raise self.surprise
        if self.slow is not None:
            await self.slow.wait()
        if not isinstance(message, Heartbeat):
            self.told.append((self.now, message))

    async def engine_lost(self, engine: Supervisor) -> None:
        self.told.append((self.now, "lost"))

    async def until(self, condition: Callable[[], bool], look: float = 0.01) -> float:
        """Wait for it; returns how long that took."""
        start = self.now
        while not condition():
            assert self.now - start < 1000
            await asyncio.sleep(look)
        return self.now - start

    async def launched(self, count: int, look: float = 0.01) -> float:
        """Wait for the engine that is started `count`th; returns how long that took."""
        return await self.until(lambda: len(self.links) == count, look)

    async def start(self) -> FakeLink:
        self.supervisor.start(self)
        return await self.begin()

    async def begin(self, count: int = 1) -> FakeLink:
        """The engine started `count`th becomes ready, and beats."""
        await self.launched(count)
        self.engine.say(READY)
        self.engine.beat()
        await self.until(lambda: self.supervisor.is_ready)
        return self.engine

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    yield scene
    if scene.slow is not None:
        scene.slow.set()
    await scene.supervisor.stop(0)
    assert all(link.status.done() for link in scene.links)


async def test_an_engine_is_configured_and_becomes_ready(scene: Scene) -> None:
    scene.supervisor.start(scene)
    await scene.launched(1)
    assert scene.supervisor.state is EngineState.STARTING
    engine = await scene.begin()
    assert engine.sent == [CONFIGURE]
    assert scene.words == ["ready"]
    assert scene.supervisor.ready == READY
    assert scene.sample("cascade_engine_up", device="cpu") == 1


async def test_its_words_reach_the_crew_and_its_figures_the_metrics(scene: Scene) -> None:
    engine = await scene.start()
    tick = Observation("prior", "24x24", 4, 3, 0.2, 8, True)
    engine.say(STEPPED, Heartbeat(0.0, 0.0, 3, 11, 12, (tick,), {"halvings": 2}))
    await scene.until(lambda: scene.sample("cascade_engine_samples", device="cpu") == 3)
    assert scene.words == ["ready", STEPPED]
    assert scene.sample("cascade_steps_total", stage="prior") == 3
    assert scene.sample("cascade_engine_events_total", event="halvings") == 2
    assert scene.sample("cascade_device_memory_bytes", device="cpu") == 12


@pytest.mark.parametrize("status", [0, 1, -9])
async def test_a_death_is_seen_at_once_and_the_engine_started_again(scene: Scene, status: int) -> None:
    engine = await scene.start()
    engine.die(status)
    assert await scene.until(lambda: "lost" in scene.words) < 1
    assert await scene.launched(2) < 0.3
    await scene.begin(2)
    assert scene.words == ["ready", "lost", "ready"]
    assert scene.sample("cascade_engine_restarts_total", device="cpu", reason="exit") == 1
    assert scene.supervisor.num_deaths == 1


async def test_the_last_words_of_a_dead_engine_are_heard(scene: Scene) -> None:
    engine = await scene.start()
    scene.slow = asyncio.Event()
    engine.say(STEPPED, STEPPED)
    await asyncio.sleep(0)
    engine.status.set_result(1)  # and somebody else keeps its socket open
    asyncio.get_running_loop().call_later(0.2, scene.slow.set)
    assert await scene.until(lambda: "lost" in scene.words) < 1
    assert scene.words == ["ready", STEPPED, STEPPED, "lost"]


async def test_an_engine_that_hangs_up_is_dead(scene: Scene) -> None:
    engine = await scene.start()
    engine.inbox.put_nowait(None)
    assert await scene.until(lambda: "lost" in scene.words) < 1
    assert engine.is_killed


async def test_noise_ends_an_engine(scene: Scene) -> None:
    engine = await scene.start()
    engine.inbox.put_nowait(ValueError("not a message"))
    assert await scene.until(lambda: "lost" in scene.words) < 1
    assert engine.is_killed


async def test_silence_is_a_hang(scene: Scene) -> None:
    engine = await scene.start()
    assert engine.beating is not None
    await asyncio.sleep(100)
    assert scene.words == ["ready"]
    engine.beating.cancel()
    assert await scene.until(lambda: "lost" in scene.words) < 17
    assert engine.is_killed
    assert scene.sample("cascade_engine_restarts_total", device="cpu", reason="hang") == 1


@pytest.mark.parametrize(
    ("busy", "predicted", "is_hung"),
    [(29.0, 1.0, False), (31.0, 1.0, True), (49.0, 10.0, False), (51.0, 10.0, True)],
)
async def test_a_step_may_take_five_times_its_time_or_half_a_minute(
    scene: Scene, busy: float, predicted: float, is_hung: bool
) -> None:
    engine = await scene.start()
    engine.beat(Heartbeat(busy, predicted, 1, 1, 1))
    await asyncio.sleep(3)
    assert engine.is_killed is is_hung


async def test_one_late_heartbeat_after_a_pause_of_everybody_is_no_hang(scene: Scene) -> None:
    engine = await scene.start()
    for _ in range(3):
        engine.say(Heartbeat(3600.0, 1.0, 1, 1, 1))
        await asyncio.sleep(1.1)
        engine.say(IDLE)
        await asyncio.sleep(1.1)
    assert not engine.is_killed


async def test_time_that_this_process_slept_through_is_not_held_against_an_engine(scene: Scene) -> None:
    await scene.start()
    loop = asyncio.get_running_loop()
    for _ in range(5):
        loop._virtual.skipped += 3600  # type: ignore[attr-defined]
        await asyncio.sleep(2)
    assert scene.words == ["ready"]


async def test_an_engine_is_not_blamed_while_its_crew_is_busy(scene: Scene) -> None:
    engine = await scene.start()
    scene.slow = asyncio.Event()
    engine.say(STEPPED)
    await asyncio.sleep(100)
    assert not engine.is_killed
    scene.slow.set()
    await asyncio.sleep(100)
    assert scene.words == ["ready", STEPPED]


async def test_loading_may_take_long_as_long_as_it_beats(scene: Scene) -> None:
    scene.supervisor.start(scene)
    await scene.launched(1)
    await asyncio.sleep(200)  # reads its libraries
    scene.engine.beat()
    await asyncio.sleep(800)
    assert len(scene.links) == 1
    await scene.begin()


async def test_an_engine_that_never_says_anything_is_replaced(scene: Scene) -> None:
    scene.supervisor.start(scene)
    assert await scene.launched(2, look=1) < 310
    assert scene.links[0].is_killed


async def test_the_pause_doubles_until_something_works(scene: Scene) -> None:
    scene.supervisor.start(scene)
    for count in range(1, 10):
        await scene.launched(count, look=0.03)
        scene.engine.die(1)
    await scene.launched(10, look=0.03)
    pauses = [after - before for before, after in zip(scene.launches, scene.launches[1:], strict=False)]
    expected = [min(0.2 * 2**n, 30) for n in range(9)]
    assert pauses == pytest.approx(expected, abs=0.05)
    (await scene.begin(10)).say(STEPPED)
    await scene.until(lambda: STEPPED in scene.words)
    scene.engine.die(1)
    assert await scene.launched(11) < 0.3


async def test_a_minute_of_health_makes_forget(scene: Scene) -> None:
    await scene.start()
    for count in (2, 3, 4):
        scene.engine.die(1)
        await scene.begin(count)
    await asyncio.sleep(59)
    scene.engine.die(1)
    assert await scene.launched(5) > 1
    await scene.begin(5)
    await asyncio.sleep(61)
    scene.engine.die(1)
    assert await scene.launched(6) < 0.3


async def test_what_cannot_be_started_is_tried_again(scene: Scene) -> None:
    scene.refusals = [OSError("no more processes")] * 3
    await scene.start()
    assert len(scene.launches) == 4


@pytest.mark.parametrize("has_said_why", [True, False])
async def test_an_unusable_model_is_not_tried_again(scene: Scene, has_said_why: bool) -> None:
    scene.supervisor.start(scene)
    await scene.launched(1)
    if has_said_why:
        scene.engine.say(Unusable("no such folder"))
    scene.engine.die(2)
    await asyncio.sleep(1000)
    assert scene.supervisor.state is EngineState.UNUSABLE
    assert scene.supervisor.reason == "no such folder" or not has_said_why
    assert scene.supervisor.reason
    assert scene.words == ["lost"]
    assert len(scene.links) == 1


async def test_a_lost_device_gets_a_new_process(scene: Scene) -> None:
    engine = await scene.start()
    engine.say(DeviceLost("an illegal memory access was encountered"))
    engine.die(3)
    await scene.begin(2)
    assert scene.sample("cascade_engine_restarts_total", device="cpu", reason="device_lost") == 1


async def test_a_mistake_of_the_crew_costs_a_life_but_not_the_supervisor(scene: Scene) -> None:
    engine = await scene.start()
    scene.surprise = KeyError("job")
    engine.say(STEPPED)
    await scene.until(lambda: "lost" in scene.words)
    scene.surprise = None
    await scene.begin(2)


async def test_stopping_lets_an_engine_drain(scene: Scene) -> None:
    engine = await scene.start()
    stopping = asyncio.create_task(scene.supervisor.stop(20))
    await asyncio.sleep(10)
    assert engine.sent == [CONFIGURE, Drain()]
    engine.die(0)
    await stopping
    assert not engine.is_killed or engine.status.result() == 0
    assert scene.words == ["ready", "lost"]
    await asyncio.sleep(100)
    assert len(scene.links) == 1


async def test_stopping_has_an_end(scene: Scene) -> None:
    engine = await scene.start()
    start = scene.now
    await scene.supervisor.stop(5)
    assert scene.now - start == pytest.approx(5, abs=0.1)
    assert engine.status.result() == -signal.SIGKILL


async def test_stopping_does_not_wait_for_a_model_to_load_nor_for_a_pause(scene: Scene) -> None:
    scene.supervisor.start(scene)
    await scene.launched(1)
    await scene.supervisor.stop(20)
    assert scene.now < 1
    other = Scene()
    other.refusals = [OSError("no")] * 30
    other.supervisor.start(other)
    await other.until(lambda: len(other.launches) == 8)
    start = other.now
    await other.supervisor.stop(20)
    assert other.now - start < 0.1


async def test_stopping_while_an_engine_is_being_started_leaves_none_behind(scene: Scene) -> None:
    scene.is_starting_slowly = True
    scene.supervisor.start(scene)
    await scene.until(lambda: bool(scene.launches))
    await scene.supervisor.stop(20)
    assert [link.is_killed for link in scene.links] == [True]
    assert scene.now < 2


async def test_words_to_nobody_are_lost(scene: Scene) -> None:
    scene.supervisor.send(Drain())
    engine = await scene.start()
    scene.supervisor.send(Run("job", 0, 1, "", 0, None, 0.0, b"{}"))
    assert len(engine.sent) == 2


ENGINE = """
    import argparse, socket, struct, sys, time
    from app.engine.protocol import Ready, frame_length, pack, to_engine
    parser = argparse.ArgumentParser()
    for name in ("--log-level", "--log-format", "--socket-fd"):
        parser.add_argument(name)
    sock = socket.socket(fileno=int(parser.parse_args().socket_fd))
    file = sock.makefile("rb")
    configure = to_engine(file.read(frame_length(file.read(4))))
    sock.sendall(pack(Ready(configure.device, configure.dtype, 64, 64, 1, {"x": 1.0})))
    file.read(frame_length(file.read(4)))
"""


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def environment_of(pid: int) -> set[bytes]:
    return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


@pytest.fixture
def launcher(tmp_path: Path) -> ProcessLauncher:
    program = tmp_path / "engine.py"
    program.write_text(textwrap.dedent(ENGINE))
    return ProcessLauncher(Settings(), program=[str(program)])


class TestProcesses:
    """The same with a real process, which has no model."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    async def test_it_talks_and_leaves(self, launcher: ProcessLauncher) -> None:
        link = await launcher()
        link.send(CONFIGURE)
        assert await link.receive() == Ready("cpu", "float32", 64, 64, 1, {"x": 1.0})
        link.send(Drain())
        assert await link.receive() is None
        assert await link.ended() == 0
        link.kill()

    async def test_it_has_the_environment_of_an_engine(self, launcher: ProcessLauncher) -> None:
        link = await launcher()
        link.send(CONFIGURE)
        await link.receive()
        wanted = {f"{name}={value}".encode() for name, value in engine_environment().items()}
        assert wanted <= environment_of(link.pid)
        link.kill()
        await link.ended()

    async def test_it_is_ours_whatever_lies_in_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = tmp_path / "app" / "engine" / "process.py"
        other.parent.mkdir(parents=True)
        for file in (other, other.with_name("__init__.py"), tmp_path / "app" / "__init__.py"):
            file.write_text("import sys; sys.exit(3)")
        monkeypatch.chdir(tmp_path)
        link = await ProcessLauncher(Settings())()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(link.ended()), 0.15)
        link.kill()
        assert await link.ended() == -signal.SIGKILL

    async def test_a_stopped_process_can_be_killed(self, launcher: ProcessLauncher) -> None:
        link = await launcher()
        link.send(CONFIGURE)
        await link.receive()
        os.kill(link.pid, signal.SIGSTOP)
        link.kill()
        assert await link.ended() == -signal.SIGKILL
        link.send(Drain())

    async def test_no_descriptor_is_left(self, launcher: ProcessLauncher) -> None:
        before = num_descriptors()
        link = await launcher()
        link.kill()
        await link.ended()
        await asyncio.sleep(0)
        assert num_descriptors() <= before
        broken = ProcessLauncher(Settings())
        broken._interpreter = "/nowhere"
        with pytest.raises(OSError, match="nowhere"):
            await broken()
        assert num_descriptors() <= before


def test_patience_is_what_was_promised() -> None:
    patience = Patience()
    assert patience.silence + patience.look <= 30
    assert (patience.step, patience.step_factor) == (30, 5)
