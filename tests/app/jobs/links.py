"""Engines without a process, that do what a test says."""

import asyncio
import signal

from app.engine.protocol import AnyFromEngine, Heartbeat, ToEngine

IDLE = Heartbeat(0.0, 0.0, 0, 1, 2)


class FakeLink:
    """An engine that does what the test says."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.inbox: asyncio.Queue[AnyFromEngine | Exception | None] = asyncio.Queue()
        self.status: asyncio.Future[int] = asyncio.Future()
        self.is_killed = False
        self.beating: asyncio.Task[None] | None = None

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    async def receive(self) -> AnyFromEngine | None:
        message = await self.inbox.get()
        if isinstance(message, Exception):
            raise message
        return message

    def kill(self) -> None:
        self.is_killed = True
        self.die(-signal.SIGKILL)

    async def ended(self) -> int:
        return await asyncio.shield(self.status)

    def say(self, *messages: AnyFromEngine) -> None:
        for message in messages:
            self.inbox.put_nowait(message)

    def die(self, status: int) -> None:
        if self.beating is not None:
            self.beating.cancel()
        if not self.status.done():
            self.inbox.put_nowait(None)
            self.status.set_result(status)

    def beat(self, heartbeat: Heartbeat = IDLE) -> None:
        """Say so every second from now on."""

        async def beat() -> None:
            while True:
                await asyncio.sleep(1)
                self.say(heartbeat)

        if self.beating is not None:
            self.beating.cancel()
        self.beating = asyncio.create_task(beat())
