"""HTTP calls to addresses that callers chose: only public ones, unless the operator allows others.

A name is resolved once, and the connection goes to the very address that was checked, so that DNS rebinding
has no effect. Redirects are not followed, and answers are bounded.
"""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpcore2

from app.settings import Network

MAX_CONNECTIONS = 100
MAX_BYTES = 64 * 1024  # of an answer: its head, and what is read of its body so that the sender can finish
CONNECT_SECONDS = 4.0  # for each address of a name but the last

T = TypeVar("T")
Address = IPv4Address | IPv6Address

_FAILURES = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError)

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")


class Unreachable(Exception):
    """No answer, or an address that may not be called; the message says why, without the URL's path."""


class NotAllowed(Unreachable):
    """The address is not public, and not one that the operator allows."""


class Outbound:
    """Makes HTTP calls. For one event loop."""

    def __init__(self, allowed: Iterable[Network | str]) -> None:
        self._backend = _Guard(allowed)

    @cached_property
    def _pool(self) -> httpcore2.AsyncConnectionPool:
        """Connection pool, created on first use: reading the system's certificates takes a while."""
        return httpcore2.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=0,
            network_backend=self._backend,
        )

    def require_allowed(self, url: str) -> None:
        """Raise NotAllowed for a URL with an address that may not be called.

        A host name is checked only when it is called.
        """
        host = (urlsplit(url).hostname or "").rstrip(".")
        if host == "localhost" or host.endswith(".localhost"):
            self._backend.choose(host, [ip_address("127.0.0.1")])
            return
        try:
            address = ip_address(host)
        except ValueError:
            return
        self._backend.choose(host, [address])

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, *, seconds: float) -> int:
        """Return the status of the answer, which must come within `seconds`. Raises Unreachable."""
        lines = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        status = 0
        try:
            async with (
                asyncio.timeout(seconds),
                self._pool.stream("POST", url, headers=lines, content=body) as answer,
            ):
                status = answer.status
                async for _ in answer.aiter_stream():
                    pass
        except TimeoutError:
            if not status:
                raise Unreachable(f"no answer in {seconds:g} s") from None
        except _FAILURES as error:
            if not status:
                raise Unreachable(str(error) or type(error).__name__) from error
        return status

    async def close(self) -> None:
        """Close the connections."""
        if "_pool" in self.__dict__:
            await self._pool.aclose()


class _Guard(httpcore2.AsyncNetworkBackend):
    """Opens connections, but only to addresses that may be called."""

    def __init__(self, allowed: Iterable[Network | str]) -> None:
        self._inner = httpcore2.AnyIOBackend()
        allowed = tuple(allowed)
        self._names = {entry.lower() for entry in allowed if isinstance(entry, str)}
        self._networks = [entry for entry in allowed if not isinstance(entry, str)]

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # the signature is the library's
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = self.choose(host, await _resolve(host, port))
        last: httpcore2.ConnectError | httpcore2.ConnectTimeout | None = None
        for number, address in enumerate(addresses, start=1):
            patience = timeout if number == len(addresses) else CONNECT_SECONDS
            try:
                return _Bounded(
                    await self._inner.connect_tcp(str(address), port, patience, local_address, socket_options)
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                last = error
        raise last or httpcore2.ConnectError("the name has no address")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)

    def choose(self, host: str, addresses: Sequence[Address]) -> Sequence[Address]:
        """Return the addresses that may be called. Raises NotAllowed if there are some, but none of these."""
        if host.rstrip(".").lower() in self._names:
            return addresses
        chosen = [address for address in addresses if is_public(address) or self._is_named(address)]
        if addresses and not chosen:
            raise NotAllowed(f"{host} is not at a public address; CASCADE_OUTBOUND_ALLOW can allow it")
        return chosen

    def _is_named(self, address: Address) -> bool:
        return any(
            address in network or all(meaning in network for meaning in _meanings(address))
            for network in self._networks
        )


class _Bounded(httpcore2.AsyncNetworkStream):
    """A connection of which at most MAX_BYTES are read: some answers, or heads, have no end."""

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner
        self._num_left = MAX_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        if not self._num_left:
            raise httpcore2.ReadError(f"the answer has more than {MAX_BYTES} bytes")
        content = await self._inner.read(min(max_bytes, self._num_left), timeout)
        self._num_left -= len(content)
        return content

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore2.AsyncNetworkStream:
        return _Bounded(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def is_public(address: Address) -> bool:
    """Return whether an address is public, and so is any IPv4 address that is embedded in it."""
    return all(
        meaning.is_global
        and not meaning.is_multicast
        and (isinstance(meaning, IPv4Address) or meaning in _GLOBAL_UNICAST)
        for meaning in _meanings(address)
    )


def _meanings(address: Address) -> list[Address]:
    """Return the IPv4 addresses that are embedded in an IPv6 address, or else the address itself."""
    if isinstance(address, IPv4Address):
        return [address]
    wrapped: list[Address] = [
        inner for inner in (address.ipv4_mapped, address.sixtofour) if inner is not None
    ]
    if address in _NAT64:
        wrapped.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return wrapped or [address]


async def _resolve(host: str, port: int) -> list[Address]:
    """Resolve a name to all its addresses, in the system's order of preference; an address to itself."""
    try:
        return [ip_address(host)]
    except ValueError:
        pass
    try:
        found = await _in_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise httpcore2.ConnectError(f"{host} cannot be found: {error}") from error
    return list(dict.fromkeys(ip_address(str(info[4][0]).partition("%")[0]) for info in found))


async def _in_thread(look: Callable[[], T]) -> T:
    """Run `look` in a daemon thread of its own, and return or raise what it does.

    The system's resolver cannot be cancelled, and a few slow names would fill a shared pool of threads.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if found.done():  # nobody waits any more
            return
        if error is not None:
            found.set_exception(error)
        else:
            found.set_result(cast(T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = look()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, name="resolver", daemon=True).start()
    return await found
