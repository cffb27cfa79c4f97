"""One end of the socket between the API process and an engine: whole messages in and out, from any thread."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

from app.engine.protocol import Message, frame_length, pack

Received = TypeVar("Received")

HEAD_BYTES = 4


class Transport(Generic[Received]):
    """A socket for whole messages. A writer thread sends them; one thread at a time may receive."""

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], Received]) -> None:
        self._socket = sock
        self._decode = decode
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self._writer.start()
        self.is_closed = False  # by this end

    def receive(self) -> Received | None:
        """Return the next message; None when the other end is gone. Raises ValueError for anything else."""
        head = self._read(HEAD_BYTES)
        body = self._read(frame_length(head)) if head else None
        return None if body is None else self._decode(body)

    def send(self, message: Message) -> None:
        """Queue a message for the writer. If the other end is gone, `receive` is what notices."""
        self._outbox.put(message)

    def close(self) -> None:
        """Write the queued messages, and hang up."""
        self.is_closed = True
        self._outbox.put(None)
        self._writer.join()
        self._hang_up()
        self._socket.close()

    def _read(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._socket.recv(min(count - len(parts), 2**20))
            except OSError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._socket.sendall(pack(message))
            except OSError:
                self._hang_up()
                return

    def _hang_up(self) -> None:
        """Shut the socket down, which wakes the readers of both ends."""
        with suppress(OSError):  # the other end hung up first
            self._socket.shutdown(socket.SHUT_RDWR)
