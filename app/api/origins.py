"""Which web pages may call: this server's own, and those that CASCADE_CORS_ORIGINS names.

A browser sends simple requests (a form, or a body without a type) from any page to any server, this machine's
included, and asks nobody. Whatever else a page sends, it has asked for with OPTIONS. Programs send no Origin.
A page may also have its host name resolve to this machine, which makes it one of ours to the browser (DNS
rebinding); it still sends that name as Host. Source: the Fetch standard, "CORS-preflight fetch".
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from app.errors import Forbidden
from app.settings import Settings

SIMPLE_TYPES = {"", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain"}
# Names that nobody can own (RFC 6761, 6762 and 8375; `.internal` by ICANN), as `host.docker.internal`.
LOCAL_NAMES = (".localhost", ".local", ".internal", ".home.arpa", ".test")
KEY_HEADERS = ("authorization", "x-api-key")  # a page of another site has to ask before it sends these


class Origins:
    """The rule for one server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._public_host = _host_of(settings.public_base_url or "")

    @property
    def has_any(self) -> bool:
        """Whether the settings name any."""
        return bool(self._settings.cors_origins)

    def allows(self, origin: str | None) -> bool:
        """Whether the settings name the origin of a page."""
        allowed = self._settings.cors_origins
        return origin is not None and ("*" in allowed or origin in allowed)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise Forbidden for what a page of another site sends unasked, or under a name of its own."""
        host, client = headers.get("host", "").lower(), scope.get("client")
        if client is not None and is_trusted(client[0], self._settings):
            host = headers.get("x-forwarded-host", host).partition(",")[0].strip().lower()
        elif self._is_open_to_pages and not self._is_our_name(host):
            raise Forbidden(
                f"this server is not called {host[:100]}; if it is, through a proxy, say so in "
                "CASCADE_PUBLIC_BASE_URL or CASCADE_TRUSTED_PROXIES"
            )
        origin = headers.get("origin")
        if origin is None or self.allows(origin) or not _is_simple(scope, headers):
            return
        page = _host_of(origin)
        is_neighbour = _is_loopback(page) and _is_loopback(host)
        if not page or (page not in (host, self._public_host) and not is_neighbour):
            raise Forbidden(
                f"pages of {origin[:100]} may not call this server: CASCADE_CORS_ORIGINS does not name it"
            )

    @property
    def _is_open_to_pages(self) -> bool:
        """Whether only the machine's own programs can call, the browser among them, and without a key."""
        return self._settings.is_loopback and not self._settings.api_keys

    def _is_our_name(self, host: str) -> bool:
        """Whether no stranger can own it: an address, a name without a dot, or the one in the settings."""
        name = _name(host)
        return (
            "." not in name
            or name.endswith(LOCAL_NAMES)
            or _address(name) is not None
            or host == self._public_host
        )


def is_trusted(address: str, settings: Settings) -> bool:
    """Whether an address is that of a proxy whose headers count."""
    client = _address(address)
    return client is not None and any(client in network for network in settings.trusted_proxies)


def _is_simple(scope: Scope, headers: Headers) -> bool:
    """Whether a browser sends it for any page without asking."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    has_key = any(name in headers for name in KEY_HEADERS)
    return scope["method"] == "POST" and kind in SIMPLE_TYPES and not has_key


def _host_of(url: str) -> str:
    """NAME or NAME:PORT of a URL or an origin; nothing of `null`, the origin of files and sandboxes."""
    return url.lower().partition("://")[2].partition("/")[0]


def _name(host: str) -> str:
    """The name or address in HOST:PORT, without brackets and final dot."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return host


def _is_loopback(host: str) -> bool:
    name = _name(host)
    address = _address(name)
    return name == "localhost" or name.endswith(".localhost") or (address is not None and address.is_loopback)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
