"""Keeps the engine of one device running: starts it, watches it, kills it when it hangs, starts it again.

Time is summed up between looks at the clock, each counting for two periods at most: when this process itself
was held up, no engine is blamed for it.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from msgspec.structs import asdict

from app.engine.protocol import (
    AnyFromEngine,
    Configure,
    DeviceLost,
    Drain,
    Heartbeat,
    Latents,
    Pixels,
    Progressed,
    Ready,
    ToEngine,
    Unusable,
)
from app.jobs.links import Launch, Link
from app.logs import Logger
from app.metrics import Metrics

UNUSABLE_STATUS = 2  # exit status of an engine that need not be started again


class EngineState(StrEnum):
    """The state of an engine, as far as it is known."""

    STARTING = "starting"
    READY = "ready"
    HUNG = "hung"
    DEAD = "dead"
    UNUSABLE = "unusable"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds after which a supervisor acts."""

    look: float = 0.5  # between two looks
    first_words: float = 300.0  # until a new process says anything: it may read gigabytes of libraries
    silence: float = 15.0  # without a heartbeat, which comes every second
    step: float = 30.0  # for a step that was not predicted to take long
    step_factor: float = 5.0  # for other steps, times the prediction
    last_words: float = 0.5  # to read what a dead engine left in the socket
    first_pause: float = 0.2  # before it is started again; doubles
    longest_pause: float = 30.0
    health: float = 60.0  # after which earlier deaths are forgotten, as they are when it does work


class EngineListener(Protocol):
    """The receiver of an engine's news. During a call the engine is neither heard nor started again."""

    async def engine_ready(self, engine: "Supervisor") -> None:
        """The engine can be given work."""

    async def engine_said(self, engine: "Supervisor", message: AnyFromEngine) -> None:
        """The engine has sent a message about its work."""

    async def engine_lost(self, engine: "Supervisor") -> None:
        """The engine is gone, with all that was aboard."""


class Supervisor:
    """The engine of one device, across its restarts."""

    def __init__(
        self,
        launch: Launch,
        configure: Configure,
        *,
        metrics: Metrics,
        logger: Logger,
        patience: Patience = Patience(),
    ) -> None:
        self.device = configure.device
        self.state = EngineState.DEAD
        self.ready: Ready | None = None  # its last message of this kind, kept across restarts
        self.reason = ""  # why it is unusable
        self.num_deaths = 0
        self._launch = launch
        self._configure = configure
        self._metrics = metrics
        self._logger = logger.bind(device=self.device)
        self._patience = patience
        self._link: Link | None = None
        self._life: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._num_failures = 0  # deaths in a row without work done

    @property
    def is_ready(self) -> bool:
        """Whether work can be given to it."""
        return self.state is EngineState.READY

    def start(self, listener: EngineListener) -> None:
        """Start the engine, and keep it alive from now on."""
        self._life = asyncio.create_task(self._live(listener), name=f"engine {self.device}")

    def send(self, message: ToEngine) -> None:
        """Send a message to the engine. If it has died, the message is lost."""
        if self._link is not None:
            self._link.send(message)

    async def stop(self, seconds: float) -> None:
        """Let the engine finish what it has aboard for at most so long, then end it."""
        self._stopping.set()
        if self._life is None:
            return
        if self.is_ready:
            self.send(Drain())
            await asyncio.wait({self._life}, timeout=seconds)
        if self._link is not None:
            self._link.kill()
        await self._life

    async def _live(self, listener: EngineListener) -> None:
        """Run the engine again and again."""
        while not self._stopping.is_set():
            cause = await self._live_once(listener)
            if self.state is EngineState.UNUSABLE or self._stopping.is_set():
                return
            self.num_deaths += 1
            self._metrics.restarted(self.device, cause)
            pause = min(self._patience.first_pause * 2**self._num_failures, self._patience.longest_pause)
            self._num_failures += 1
            self._logger.warning("the engine died and is started again", cause=cause, seconds=pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()

    async def _live_once(self, listener: EngineListener) -> str:
        """Start the engine and wait for its end; return the cause in a word."""
        self.state = EngineState.STARTING
        try:
            link = await self._launch()
        except OSError as error:
            self._logger.error("the engine cannot be started", reason=str(error))
            self.state = EngineState.DEAD
            return "exit"
        self._link = link
        link.send(self._configure)
        if self._stopping.is_set():
            link.kill()
        talk = _Conversation(self, link, listener, self._patience, self._metrics, self._logger)
        try:
            cause = await talk.until_the_end()
        finally:
            self._link = None
            self._metrics.engine_up.labels(self.device).set(0)
        self._logger.info("the engine ended", cause=cause, status=talk.status)
        if talk.reason or talk.status == UNUSABLE_STATUS:
            self.reason = talk.reason or f"the engine left with status {talk.status}; its log says why"
            self.state = EngineState.UNUSABLE
            self._logger.error("the model cannot be used", reason=self.reason)
        else:
            self.state = EngineState.DEAD
        await self._report_death(listener)
        return cause

    async def _report_death(self, listener: EngineListener) -> None:
        try:
            await listener.engine_lost(self)
        except Exception as error:  # the device goes on, whatever is wrong with the listener
            self._logger.error("the death of the engine was not dealt with", exc_info=error)

    def came_up(self, ready: Ready) -> None:
        """Note that the engine has loaded the model."""
        self.ready = ready
        self.state = EngineState.READY
        self._metrics.engine_up.labels(self.device).set(1)
        self._logger.info("the engine is ready", dtype=ready.dtype, max_samples=ready.max_samples)

    def proved_well(self) -> None:
        """Forget earlier deaths, because the engine works."""
        self._num_failures = 0


class _Conversation:
    """One run of an engine process: its messages, its silence and its end."""

    def __init__(
        self,
        engine: Supervisor,
        link: Link,
        listener: EngineListener,
        patience: Patience,
        metrics: Metrics,
        logger: Logger,
    ) -> None:
        self.status: int | None = None
        self.reason = ""
        self._engine = engine
        self._link = link
        self._crew = listener
        self._patience = patience
        self._metrics = metrics
        self._logger = logger
        self._cause = "exit"
        self._silence = 0.0
        self._age = 0.0  # seconds since it was ready
        self._has_spoken = False
        self._is_heard = True  # False while a message is being handled
        self._num_overdue = 0  # heartbeats in a row that tell of a step that takes too long

    async def until_the_end(self) -> str:
        """Listen and watch until the engine has ended, by itself or by us; return the cause."""
        listening = asyncio.create_task(self._listen())
        watching = asyncio.create_task(self._watch())
        ending = asyncio.create_task(self._end())
        try:
            await asyncio.wait({listening, watching, ending}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                self._engine.state, self._cause = EngineState.HUNG, "hang"
            elif ending.done():
                await asyncio.wait({listening}, timeout=self._patience.last_words)
            else:
                await asyncio.wait({ending}, timeout=self._patience.last_words)
        finally:
            self._link.kill()
            for task in (listening, watching):
                task.cancel()
            await asyncio.wait({listening, watching, ending})
        return self._cause

    async def _end(self) -> None:
        self.status = await self._link.ended()

    async def _listen(self) -> None:
        try:
            while (message := await self._link.receive()) is not None:
                self._silence, self._has_spoken = 0.0, True
                self._is_heard = False
                await self._hear(message)
                self._is_heard = True
                await asyncio.sleep(0)  # a burst of messages must not hold up other tasks
        except ValueError as error:  # msgspec's errors are ValueErrors, too
            self._logger.error("the engine says what cannot be understood", reason=str(error))
        except Exception as error:  # a bug of ours ends the engine, so that it is seen
            self._logger.error("what the engine said was not dealt with", exc_info=error)

    async def _hear(self, message: AnyFromEngine) -> None:
        match message:
            case Ready():
                self._engine.came_up(message)
                await self._crew.engine_ready(self._engine)
                return
            case Unusable(reason):
                self.reason = reason
                return
            case DeviceLost(reason):
                self._cause = "device_lost"
                self._logger.error("the device is lost", reason=reason)
                return
            case Heartbeat():
                self._feel(message)
            case Progressed() | Latents() | Pixels():
                self._engine.proved_well()
        await self._crew.engine_said(self._engine, message)

    def _feel(self, beat: Heartbeat) -> None:
        """Take in a heartbeat. A step is overdue when two in a row say so: the first after a pause of the
        whole machine does not count."""
        limit = max(self._patience.step, self._patience.step_factor * beat.predicted_seconds)
        self._num_overdue = self._num_overdue + 1 if beat.busy_seconds > limit else 0
        self._metrics.beat(
            self._engine.device,
            num_samples=beat.num_samples,
            memory_bytes=beat.memory_bytes,
            device_memory_bytes=beat.device_memory_bytes,
        )
        for tick in beat.ticks:
            self._metrics.ticked(**asdict(tick))
        for event, times in beat.events.items():
            self._metrics.happened(event, times)

    async def _watch(self) -> None:
        """Return when the engine hangs."""
        loop, look = asyncio.get_running_loop(), self._patience.look
        seen = loop.time()
        while not self._is_hung():
            await asyncio.sleep(look)
            passed, seen = min(loop.time() - seen, 2 * look), loop.time()
            if self._is_heard:
                self._silence += passed
            if self._engine.is_ready:
                self._age += passed
            if self._age >= self._patience.health:
                self._engine.proved_well()

    def _is_hung(self) -> bool:
        limit = self._patience.silence if self._has_spoken else self._patience.first_words
        return self._silence > limit or self._num_overdue >= 2
