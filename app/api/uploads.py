"""Bodies on their way in: each has its time, and none is waited for when the server is about to stop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.errors import RequestTimeout, ShuttingDown


class Uploads:
    """All bodies that are being read."""

    def __init__(self) -> None:
        self._open: set[asyncio.Timeout] = set()
        self._is_closed = False

    @asynccontextmanager
    async def reading(self, seconds: float) -> AsyncIterator[None]:
        """Read a body inside. Raises RequestTimeout when that takes too long, ShuttingDown when we close."""
        if self._is_closed:
            raise ShuttingDown
        try:
            async with asyncio.timeout(seconds) as patience:
                self._open.add(patience)
                try:
                    yield
                finally:
                    self._open.discard(patience)
        except TimeoutError:
            if self._is_closed:
                raise ShuttingDown from None
            raise RequestTimeout(
                f"the body did not come within {seconds:g} seconds", headers={"Connection": "close"}
            ) from None

    @property
    def num_open(self) -> int:
        """Bodies that are being read now."""
        return len(self._open)

    def close(self) -> None:
        """Stop reading, now and from now on."""
        self._is_closed = True
        for patience in self._open:
            patience.reschedule(0)
