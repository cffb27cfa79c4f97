"""Request bodies being read: each has a time limit, and none is waited for when the server stops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.errors import RequestTimeout, ShuttingDown


class Uploads:
    """All request bodies that are being read."""

    def __init__(self) -> None:
        self._open: set[asyncio.Timeout] = set()
        self._is_closed = False

    @asynccontextmanager
    async def reading(self, seconds: float) -> AsyncIterator[None]:
        """Limit the time to read a body in the block. Raises RequestTimeout, or ShuttingDown once closed."""
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
        """Number of bodies that are being read now."""
        return len(self._open)

    def close(self) -> None:
        """Stop reading, and refuse further bodies."""
        self._is_closed = True
        for patience in self._open:
            patience.reschedule(0)
