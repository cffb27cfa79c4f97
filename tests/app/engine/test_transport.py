"""Whole messages over a socket, from many threads, until one end is gone."""

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from app.engine.protocol import (
    MAX_MESSAGE_BYTES,
    AnyFromEngine,
    AnyToEngine,
    Cancel,
    Configure,
    Drain,
    Latents,
    Run,
    from_engine,
    to_engine,
)
from app.engine.transport import Transport

Engine = Transport[AnyToEngine]
Parent = Transport[AnyFromEngine]


@pytest.fixture
def pair() -> Iterator[tuple[Parent, Engine, socket.socket]]:
    here, there = socket.socketpair()
    yield Transport(here, from_engine), Transport(there, to_engine), here
    here.close()
    there.close()


def test_messages_arrive_in_order_and_whole(pair: tuple[Parent, Engine, socket.socket]) -> None:
    parent, engine, _ = pair
    sent = [
        Configure("embedded", "cpu", "float32", weights={"a": 2.0}),
        Run("j", 1, 2**32 - 1, "t", -3, None, 0.5, b"{}", latents=bytes(range(256)) * 2000),
        Cancel("j"),
        Drain(),
    ]
    for message in sent:
        parent.send(message)
    assert [engine.receive() for _ in sent] == sent


def test_threads_do_not_mix_their_messages(pair: tuple[Parent, Engine, socket.socket]) -> None:
    parent, engine, _ = pair

    def send(number: int) -> None:
        for index in range(50):
            engine.send(Latents(str(number), index, bytes([number]) * 5000))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    received = [parent.receive() for _ in range(200)]
    for number in range(4):
        own = [message for message in received if isinstance(message, Latents) and message.job == str(number)]
        assert [message.index for message in own] == list(range(50))
        assert all(message.latents == bytes([number]) * 5000 for message in own)


def test_what_was_sent_is_written_before_closing(pair: tuple[Parent, Engine, socket.socket]) -> None:
    parent, engine, _ = pair
    engine.send(Latents("a", 0, bytes(1_000_000)))
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert parent.receive() == Latents("a", 0, bytes(1_000_000))
    assert parent.receive() is None
    closing.join(10)
    assert engine.is_closed


def test_the_end_is_seen_even_in_the_middle_of_a_message(pair: tuple[Parent, Engine, socket.socket]) -> None:
    _, engine, sock = pair
    sock.sendall(b"\x00\x00\x00\x08abc")
    sock.shutdown(socket.SHUT_RDWR)
    assert engine.receive() is None


def test_sending_to_nobody_wakes_the_reader(pair: tuple[Parent, Engine, socket.socket]) -> None:
    _, engine, sock = pair
    sock.shutdown(socket.SHUT_RD)
    for _ in range(2):
        engine.send(Latents("a", 0, bytes(1_000_000)))
    assert engine.receive() is None
    engine.close()


@pytest.mark.parametrize("body", [b"", b"\xc1", msgspec.msgpack.encode({"type": "ready"}), b"cos\nsystem\n"])
def test_noise_is_refused(pair: tuple[Parent, Engine, socket.socket], body: bytes) -> None:
    _, engine, sock = pair
    sock.sendall(len(body).to_bytes(4, "big") + body)
    with pytest.raises(msgspec.DecodeError):
        engine.receive()


def test_a_length_beyond_the_limit_is_refused(pair: tuple[Parent, Engine, socket.socket]) -> None:
    _, engine, sock = pair
    sock.sendall((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="over the limit"):
        engine.receive()
