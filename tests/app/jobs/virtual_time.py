"""An event loop whose clock jumps ahead instead of waiting, so that half a minute passes in no time.

For tests without threads and other processes: what those are about to say would come too late.
"""

import asyncio
import selectors
from typing import Any


class _Selector(selectors.SelectSelector):
    """Never sleeps; says how long it should have slept."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("everybody waits for something that never happens")
            self.skipped += max(timeout, 0.0)
        return ready


class VirtualTime(asyncio.SelectorEventLoop):
    """Its time is its own."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.skipped


BACKEND = ("asyncio", {"loop_factory": VirtualTime})
