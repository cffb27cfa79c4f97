"""Calls to addresses that callers chose: no way leads to one that is not public."""

import asyncio
import socket
import ssl
import threading
from ipaddress import ip_address
from typing import Any

import pytest

from app.outbound import NotAllowed, Outbound, Unreachable, is_public
from app.settings import Settings
from tests.receiver import Receiver, answer

pytestmark = pytest.mark.anyio

SECONDS = 5.0


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.10", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fec0::1", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "2002:0a00:0001::", "2001:0:7f00:1:0:0:8080:8080", "64:ff9b:1::a00:1"),
    ],
)
async def test_what_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    url_host = f"[{address}]" if ":" in address else address
    async with outbound() as out:
        with pytest.raises(NotAllowed):
            out.require_allowed(f"https://{url_host}/hook")
        with pytest.raises(NotAllowed, match="public"):
            await out.post(f"http://{url_host}:9/hook", {}, b"", seconds=SECONDS)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "203.1.113.5", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
async def test_what_is_public(address: str) -> None:
    assert is_public(ip_address(address))
    async with outbound() as out:
        out.require_allowed(f"https://[{address}]/" if ":" in address else f"https://{address}/")


class outbound:  # noqa: N801  # reads as a function
    """`async with outbound("10.0.0.0/8") as out`."""

    def __init__(self, *allowed: str) -> None:
        self._outbound = Outbound(Settings(outbound_allow=allowed).outbound_allow)

    async def __aenter__(self) -> Outbound:
        return self._outbound

    async def __aexit__(self, *_: object) -> None:
        await self._outbound.close()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "a.localhost", "localhost."])
async def test_this_machine_by_its_name(host: str) -> None:
    async with outbound() as out:
        with pytest.raises(NotAllowed):
            out.require_allowed(f"http://{host}/")


async def test_a_name_of_a_private_address_is_found_out_when_it_is_called() -> None:
    async with Receiver() as receiver, outbound() as out:
        url = receiver.url.replace("127.0.0.1", "localhost")
        with pytest.raises(NotAllowed, match="CASCADE_OUTBOUND_ALLOW"):
            await out.post(url, {}, b"", seconds=SECONDS)
        assert receiver.calls == []


@pytest.mark.parametrize("allowed", ["127.0.0.0/8", "127.0.0.1", "LocalHost"])
async def test_the_operator_can_allow_it(allowed: str) -> None:
    async with Receiver() as receiver, outbound("10.0.0.0/8", "other.example", allowed) as out:
        url = receiver.url.replace("127.0.0.1", "localhost") + "/hook?a=b#c"
        out.require_allowed(url)
        assert await out.post(url, {"x-one": "two"}, "привет".encode(), seconds=SECONDS) == 204
        [call] = receiver.calls
    assert (call.path, call.body.decode(), call.headers["x-one"]) == ("/hook?a=b", "привет", "two")
    assert call.headers["host"] == url.split("/")[2]


async def test_a_network_is_allowed_however_its_addresses_are_written() -> None:
    async with outbound("10.0.0.0/8") as out:
        out.require_allowed("http://[::ffff:10.0.0.1]/")
        with pytest.raises(NotAllowed):
            out.require_allowed("http://[::ffff:11.0.0.1]:80/".replace("11.", "127."))


async def test_what_a_name_means_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that means something else a moment later (DNS rebinding) does not lead there."""
    loop, asked = asyncio.get_running_loop(), 0
    public = socket.getaddrinfo("192.0.2.7", 80, type=socket.SOCK_STREAM)  # stands for a public address
    private = socket.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
    connected: list[Any] = []

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        return public if asked == 1 else private

    async def create_connection(_: Any, host: str, port: int, **__: Any) -> Any:
        connected.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "create_connection", create_connection)
    async with outbound("192.0.2.0/24") as out:
        with pytest.raises(Unreachable):
            await out.post("http://two-faced.example/", {}, b"", seconds=SECONDS)
        assert connected == ["192.0.2.7"]
        with pytest.raises(NotAllowed):
            await out.post("http://two-faced.example/", {}, b"", seconds=SECONDS)
        assert connected == ["192.0.2.7"]


async def test_only_public_ones_of_several_addresses_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    hosts = ("10.0.0.1", "8.8.8.8", "127.0.0.1", "8.8.4.4")
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 80)) for host in hosts]
    connected: list[Any] = []

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        return found

    async def create_connection(_: Any, host: str, port: int, **__: Any) -> Any:
        connected.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "create_connection", create_connection)
    async with outbound() as out:
        with pytest.raises(Unreachable):
            await out.post("http://mixed.example/", {}, b"", seconds=SECONDS)
    assert connected == ["8.8.8.8", "8.8.4.4"]


async def test_redirects_are_not_followed() -> None:
    async with Receiver() as inside, Receiver(answer(307, f"location: {inside.url}/x")) as door:
        async with outbound("127.0.0.1") as out:
            assert await out.post(door.url, {}, b"", seconds=SECONDS) == 307
        assert inside.calls == []


async def test_who_does_not_answer_is_not_waited_for() -> None:
    async with Receiver(lambda call: None) as receiver, outbound("127.0.0.1") as out:
        with pytest.raises(Unreachable, match=r"no answer in 0\.05 s"):
            await out.post(receiver.url, {}, b"", seconds=0.05)


async def test_of_an_endless_answer_little_is_read() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100000000000\r\n\r\n"
    async with Receiver(lambda call: head + b"x" * 10_000_000) as receiver, outbound("127.0.0.1") as out:
        assert await out.post(receiver.url, {}, b"", seconds=SECONDS) == 200


async def test_of_an_answer_that_comes_slowly_the_status_counts() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx"
    async with Receiver(lambda call: head) as receiver, outbound("127.0.0.1") as out:
        assert await out.post(receiver.url, {}, b"", seconds=0.1) == 200


async def test_a_short_answer_is_read_to_its_end() -> None:
    """Who is cut off while answering may think that nobody has heard."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 30000\r\n\r\n"
    async with Receiver(lambda call: head + b"x" * 30_000) as receiver, outbound("127.0.0.1") as out:
        assert await out.post(receiver.url, {}, b"", seconds=SECONDS) == 200


@pytest.mark.parametrize("flood", [b"HTTP/1.1 100 x\r\n\r\n", b"HTTP/1.1 200 x\r\n" + b"a: b\r\n" * 9])
async def test_a_head_without_an_end_holds_nobody_up(flood: bytes) -> None:
    async with Receiver(lambda call: flood * 100_000) as receiver, outbound("127.0.0.1") as out:
        with pytest.raises(Unreachable):
            await out.post(receiver.url, {}, b"", seconds=SECONDS)


@pytest.mark.parametrize("noise", [b"220 mail.example ESMTP\r\n", b"\x00" * 200_000, b"HTTP/1.1 200"])
async def test_noise_is_no_answer(noise: bytes) -> None:
    async with Receiver(lambda call: noise) as receiver, outbound("127.0.0.1") as out:
        with pytest.raises(Unreachable):
            await out.post(receiver.url, {}, b"", seconds=0.2)


async def test_nobody_is_there() -> None:
    async with Receiver() as receiver:
        url = receiver.url
    async with outbound("127.0.0.1") as out:
        with pytest.raises(Unreachable):
            await out.post(url, {}, b"", seconds=SECONDS)
        with pytest.raises(Unreachable, match="cannot be found"):
            await out.post("http://nothing.invalid/", {}, b"", seconds=SECONDS)
        with pytest.raises(Unreachable):
            await out.post(url.replace("http:", "https:"), {}, b"", seconds=SECONDS)


async def test_a_slow_name_takes_no_thread_that_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: slow.wait(10))
    try:
        async with outbound() as out:
            calls = [out.post(f"http://{n}.example/", {}, b"", seconds=0.2) for n in range(50)]
            waiting = asyncio.gather(*calls, return_exceptions=True)
            async with asyncio.timeout(5):
                assert await asyncio.to_thread(lambda: "free") == "free"
            assert all(isinstance(error, Unreachable) for error in await waiting)
    finally:
        slow.set()


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
async def test_names_that_cannot_be_one(host: str) -> None:
    async with outbound() as out:
        with pytest.raises(Unreachable):
            await out.post(f"http://{host}/", {}, b"", seconds=SECONDS)


async def test_the_next_address_of_a_name_is_tried_when_one_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    connect = loop.create_connection
    monkeypatch.setattr("app.outbound.CONNECT_SECONDS", 0.05)

    async def create_connection(factory: Any, host: str, port: int, **options: Any) -> Any:
        if host == "127.0.0.2":
            await asyncio.sleep(60)
        return await connect(factory, host, port, **options)

    async with Receiver() as receiver, outbound("127.0.0.0/8") as out:
        port = int(receiver.url.rpartition(":")[2])
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        monkeypatch.setattr(loop, "create_connection", create_connection)
        assert await out.post(f"http://two.example:{port}/", {}, b"", seconds=SECONDS) == 204


async def test_an_error_of_tls_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Receiver() as receiver, outbound("127.0.0.1") as out:

        async def read(*_: Any, **__: Any) -> bytes:
            raise ssl.SSLError("a certificate is required")

        monkeypatch.setattr("app.outbound._Bounded.read", read)
        with pytest.raises(Unreachable, match="certificate"):
            await out.post(receiver.url, {}, b"", seconds=SECONDS)


async def test_networks_of_wrapped_addresses() -> None:
    async with outbound("64:ff9b::/96") as out:
        out.require_allowed("http://[64:ff9b::7f00:1]/")
        with pytest.raises(NotAllowed):
            out.require_allowed("http://127.0.0.1/")
