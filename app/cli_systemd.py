"""What a service manager is told of this process, in systemd's notification protocol.

Without a service manager all of it is silence. One that went away is not our concern either.
"""

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from typing import Self

MICROSECOND = 1e-6


class ServiceManager:
    """Whoever started this process and wants to hear of it."""

    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self._address = address
        self._watchdog_seconds = watchdog_seconds

    @classmethod
    def of_environment(cls, environment: Mapping[str, str], pid: int) -> Self:
        """As NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say it to the process with this id."""
        microseconds = environment.get("WATCHDOG_USEC", "")
        is_meant = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        seconds = int(microseconds) * MICROSECOND if microseconds.isdecimal() and is_meant else None
        return cls(environment.get("NOTIFY_SOCKET") or None, seconds or None)

    def starting(self, what: str) -> None:
        """Not ready yet; `what` shows in `systemctl status`."""
        self._tell(f"STATUS={what}")

    def ready(self, what: str) -> None:
        """Requests are accepted from now on."""
        self._tell(f"READY=1\nSTATUS={what}")

    def stopping(self, what: str) -> None:
        """No more requests are accepted."""
        self._tell(f"STOPPING=1\nSTATUS={what}")

    async def keep_alive(self) -> None:
        """Feed the watchdog from the event loop until cancelled: a loop that is stuck does not feed it."""
        if self._watchdog_seconds is None:
            return
        while True:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_seconds / 2)

    def _tell(self, lines: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as letterbox:
            letterbox.setblocking(False)
            letterbox.sendto(lines.encode(), address)
