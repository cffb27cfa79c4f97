"""Calls to addresses that callers chose: only public ones, unless the operator names them.

A name is resolved once, and the connection goes to the very address that was looked at: a name that means
something else a moment later leads nowhere. Redirects are not followed, and bodies of answers not read.
"""

import asyncio
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit

import httpcore2

from app.settings import Network

MAX_CONNECTIONS = 100
MAX_IDLE_CONNECTIONS, IDLE_SECONDS = 10, 10.0

Address = IPv4Address | IPv6Address

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")


class Unreachable(Exception):
    """No answer, or nobody that may be asked; the message says why, without the path that was called."""


class NotAllowed(Unreachable):
    """The address is not public, and not one that the operator allows."""


class Outbound:
    """Calls others. For one event loop."""

    def __init__(self, allowed: Iterable[Network | str]) -> None:
        self._backend = _Guard(allowed)
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=self._backend,
        )

    def require_allowed(self, url: str) -> None:
        """Raises NotAllowed for a URL that names an address where nobody may be asked.

        Whether a name leads to one is found out when it is called.
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
        """The status of the answer, which must come within `seconds`. Raises Unreachable."""
        lines = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        try:
            async with (
                asyncio.timeout(seconds),
                self._pool.stream("POST", url, headers=lines, content=body) as answer,
            ):
                return answer.status
        except TimeoutError:
            raise Unreachable(f"no answer in {seconds:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            raise Unreachable(str(error) or type(error).__name__) from error

    async def close(self) -> None:
        """Hang up."""
        await self._pool.aclose()


class _Guard(httpcore2.AsyncNetworkBackend):
    """Opens connections, to addresses that may be called."""

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
        last: httpcore2.ConnectError | None = None
        for address in self.choose(host, await _resolve(host, port)):
            try:
                return await self._inner.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except httpcore2.ConnectError as error:
                last = error
        raise last or httpcore2.ConnectError("the name has no address")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)

    def choose(self, host: str, addresses: Sequence[Address]) -> Sequence[Address]:
        """Those that may be called. Raises NotAllowed when there are addresses, and none of them is."""
        if host.rstrip(".").lower() in self._names:
            return addresses
        chosen = [address for address in addresses if is_public(address) or self._is_named(address)]
        if addresses and not chosen:
            raise NotAllowed(f"{host} is not at a public address; CASCADE_OUTBOUND_ALLOW can allow it")
        return chosen

    def _is_named(self, address: Address) -> bool:
        return any(inner in network for network in self._networks for inner in _meanings(address))


def is_public(address: Address) -> bool:
    """Whether an address leads to the internet, also where one of the other kind is wrapped in it."""
    return all(
        meaning.is_global
        and not (meaning.is_multicast or meaning.is_reserved)
        and (isinstance(meaning, IPv4Address) or meaning in _GLOBAL_UNICAST)
        for meaning in _meanings(address)
    )


def _meanings(address: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 address stands for, if it does; else itself."""
    if isinstance(address, IPv4Address):
        return [address]
    wrapped: list[Address] = [
        inner for inner in (address.ipv4_mapped, address.sixtofour) if inner is not None
    ]
    wrapped += address.teredo or ()
    if address in _NAT64:
        wrapped.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return wrapped or [address]


async def _resolve(host: str, port: int) -> list[Address]:
    """All addresses of a name, or the address that it is, in the order of preference of the system."""
    try:
        return [ip_address(host)]
    except ValueError:
        pass
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpcore2.ConnectError(f"{host} cannot be found: {error}") from error
    return list(dict.fromkeys(ip_address(str(info[4][0]).partition("%")[0]) for info in found))
