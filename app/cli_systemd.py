"""Notifications of this process to a service manager, in systemd's protocol.

Without a service manager nothing is sent. One that has gone away is ignored.
"""

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from typing import Self

MICROSECOND = 1e-6


class ServiceManager:
    """The service manager that started this process, if any."""

    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self._address = address
        self._watchdog_seconds = watchdog_seconds

    @classmethod
    def of_environment(cls, environment: Mapping[str, str], pid: int) -> Self:
        """Create it from NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, for the process with this id."""
        microseconds = environment.get("WATCHDOG_USEC", "")
        is_meant = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        seconds = int(microseconds) * MICROSECOND if microseconds.isdecimal() and is_meant else None
        return cls(environment.get("NOTIFY_SOCKET") or None, seconds or None)

    def starting(self, what: str) -> None:
        """Report that it is not ready yet; `what` shows in `systemctl status`."""
        self._tell(f"STATUS={what}")

    def ready(self, what: str) -> None:
        """Report that requests are accepted from now on."""
        self._tell(f"READY=1\nSTATUS={what}")

    def stopping(self, what: str) -> None:
        """Report that no more requests are accepted."""
        self._tell(f"STOPPING=1\nSTATUS={what}")

    async def keep_alive(self) -> None:
        """Feed the watchdog from the event loop until cancelled: a stuck loop does not feed it."""
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
