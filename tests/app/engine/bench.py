"""A bench for the engine's loop: an inbox that the test fills, a clock that only steps move."""

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from app.engine.cost import CostModel
from app.engine.engine import Engine, HungUp, Inbox
from app.engine.protocol import (
    AnyToEngine,
    Drain,
    Failed,
    Heartbeat,
    Message,
    Observation,
    Pixels,
    Progressed,
    Run,
    Stepped,
)
from app.engine.pulse import Pulse
from app.engine.scheduler import Scheduler
from app.jobs.faults import NO_FAULTS
from app.logs import make_logger
from app.schemas import GenerationRequest
from app.settings import Settings
from tests.app.fakes import FakeRunner, FakeTrack

Said = TypeVar("Said", bound=Message)

STEP_SECONDS = 0.03


@cache
def log_settings() -> Settings:
    return Settings(log_format="json", log_level="warning")


class Bench:
    """An engine between an inbox that the test fills and a list of what the engine says."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.now = 1000.0
        self.inbox: Inbox = SimpleQueue()
        self.said: list[Message] = []
        self.log = io.StringIO()
        self.plans: dict[int, Callable[[], None]] = {}  # what happens during a step, by its number
        self.num_tries = 0
        runner.on_step = self._step
        self.pulse = Pulse(runner, self.said.append, lambda: self.now)
        self.engine = Engine(
            runner,
            Scheduler(runner.cap, {}),
            CostModel(),
            inbox=self.inbox,
            send=self.said.append,
            pulse=self.pulse,
            faults=NO_FAULTS,
            clock=lambda: self.now,
            logger=make_logger(log_settings(), self.log),
        )

    def _step(self, tracks: Sequence[FakeTrack]) -> None:
        self.now += STEP_SECONDS
        self.num_tries += 1
        self.plans.get(self.num_tries, lambda: None)()

    def during(self, step: int, *messages: AnyToEngine | HungUp) -> None:
        """Let messages arrive while a step is taken. The first has the number 1."""
        self.plans[step] = lambda: self.tell(*messages)

    def tell(self, *messages: AnyToEngine | HungUp) -> None:
        for message in messages:
            self.inbox.put(message)

    def work(self, *messages: AnyToEngine | HungUp) -> None:
        """Do all that is asked for, and end; a loop that does not end fails the test."""
        self.tell(*messages, Drain())
        ended: Future[None] = Future()

        def run() -> None:
            try:
                ended.set_result(self.engine.run())  # type: ignore[func-returns-value]
            except Exception as error:
                ended.set_exception(error)

        Thread(target=run, daemon=True).start()
        ended.result(20)

    def of(self, kind: type[Said]) -> list[Said]:
        return [message for message in self.said if isinstance(message, kind)]

    @property
    def steps(self) -> list[Stepped]:
        """All that was told of steps."""
        return [step for message in self.of(Progressed) for step in message.steps]

    @property
    def made(self) -> dict[tuple[str, int], bytes]:
        """Pixels by job and index."""
        pixels = self.of(Pixels)
        assert len(pixels) == len({(message.job, message.index) for message in pixels})
        return {(message.job, message.index): message.pixels for message in pixels}

    @property
    def failed(self) -> dict[str, str]:
        """Codes by job."""
        return {message.job: message.code for message in self.of(Failed)}

    @property
    def ticks(self) -> list[Observation]:
        """What was observed of steps."""
        self.pulse.beat()
        return [tick for message in self.of(Heartbeat) for tick in message.ticks]

    @property
    def batches(self) -> list[list[str]]:
        """The jobs that stepped together, step by step."""
        return [[track.run.job for track in batch] for batch in self.runner.batches]


def wait_until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    """Wait for another thread, which may never do it."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.0005)


Watch = Callable[[Sequence[FakeTrack]], None]


def watched(*watches: Watch) -> Watch:
    """All of them, one after the other."""

    def watch(tracks: Sequence[FakeTrack]) -> None:
        for one in watches:
            one(tracks)

    return watch


def asked(prompt: str = "x", *, guidance: float = 0.0, width: int = 64) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, width=width, height=64, seeds=(0,), prior_guidance_scale=guidance)


def run(job: str = "a", index: int = 0, *, request: GenerationRequest | None = None, **more: Any) -> Run:
    return Run(
        job=job,
        index=index,
        seed=index,
        request=(request or asked(job)).model_dump_json().encode(),
        **{"tenant": "", "priority": 0, "deadline": None, "waited": 0.0, **more},
    )
