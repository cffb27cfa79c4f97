"""Whether there is room for jobs and pictures: on one disk or on several, or in a bucket that answers.

New jobs are refused before a disk is full, so that those in work find room. A write that finds none all the
same waits for it and is not lost; callers that wait for such a job are soon told so.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from app.errors import StorageAway, StorageFull
from app.logs import Logger
from app.metrics import Metrics
from app.storage.writing import space_of

NO_ROOM = "there is no room to keep another job; the operator has to make some"
IS_AWAY = "the store of pictures does not answer; no other job is accepted until it does"
LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 2.0  # without room before waiting callers are told
RESERVE_BYTES = 16 * 2**20  # more than the largest picture; with less, nothing new is accepted
RESERVE_SHARE = 0.05  # of a small disk
LEAST_BYTES = 64 * 2**10  # with less, hardly a picture can be kept


class DiskSpace:
    """What is known of the space on the disks. For one event loop."""

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        try_job: Callable[[], Awaitable[None]],
        on_held_up: Callable[[bool], None],
        metrics: Metrics,
        logger: Logger,
    ) -> None:
        self._folders = folders
        self._try_job = try_job  # raises what submitting a job would
        self._on_held_up = on_held_up
        self._metrics = metrics
        self._logger = logger
        self._is_low = self._is_out = False  # of the folders, when they were last looked at
        self._is_refused = False  # the database took no job for want of room
        self._lacking: dict[object, StorageFull] = {}  # what is to be written and finds no room, and why
        self._held_up_since: float | None = None
        self._is_known_short = False

    @property
    def is_short(self) -> bool:
        """Whether nothing new should be accepted."""
        return self._is_low or self._is_refused or bool(self._lacking)

    @property
    def is_away(self) -> bool:
        """Whether it is a bucket that does not answer."""
        return any(isinstance(error, StorageAway) for error in self._lacking.values())

    def refusal(self) -> StorageFull:
        """Return the error for a job that is not accepted."""
        return StorageAway(IS_AWAY) if self.is_away else StorageFull(NO_ROOM)

    def refused(self, error: StorageFull) -> None:
        """Note that the database had no room for a job. From then on it is asked whether it has some."""
        self._is_refused = True
        self._judge(error.reason)

    def lacks(self, what: object, error: StorageFull) -> None:
        """Note that a write, identified by `what`, finds no room and will be tried again."""
        self._lacking[what] = error
        self._judge(error.reason)

    def suffices(self, what: object) -> None:
        """Note that it found room, or is not wanted any more."""
        if what in self._lacking:
            del self._lacking[what]
            self._judge()

    async def watch(self) -> None:
        """Look at the disks periodically, until canceled."""
        while True:
            self._is_low, self._is_out = await asyncio.to_thread(self._look)
            if self._is_refused:
                await self._ask_again()
            self._judge()
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> tuple[bool, bool]:
        spaces = [space for folder in self._folders if (space := space_of(folder)) is not None]
        is_low = any(space.free < min(RESERVE_BYTES, RESERVE_SHARE * space.total) for space in spaces)
        return is_low, any(space.free < LEAST_BYTES for space in spaces)

    async def _ask_again(self) -> None:
        try:
            await self._try_job()
        except StorageFull:
            return
        except Exception as error:  # the database is away, and may be full when it is back
            self._logger.debug("it is not known whether there is room again", reason=str(error))
            return
        self._is_refused = False

    def _judge(self, reason: str = "the disk of the data folder is nearly full") -> None:
        """Report whether jobs are held up and, if that has changed, whether there is room."""
        now = asyncio.get_running_loop().time()
        if not (self._lacking or self._is_out):
            self._held_up_since = None
        elif self._held_up_since is None:
            self._held_up_since = now
        self._on_held_up(self._held_up_since is not None and now - self._held_up_since >= PATIENCE_SECONDS)
        if self.is_short == self._is_known_short:
            return
        self._is_known_short = self.is_short
        self._metrics.out_of_room.set(self.is_short)
        if self.is_short:
            folders = [str(folder) for folder in self._folders]
            if self.is_away:
                self._logger.error("the bucket does not answer; nothing new is accepted", reason=reason)
            else:
                self._logger.error(
                    "there is no room left; nothing new is accepted", reason=reason, folders=folders
                )
        else:
            self._logger.info("there is room again")
