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
# Domains that nobody on the internet can own: reserved by RFC 6761, 6762 and 8375, or by ICANN, which will
# not delegate `.lan`, `.home` and `.corp` either; `.svc` is of Kubernetes.
LOCAL_NAMES = (
    *(".localhost", ".local", ".internal", ".home.arpa", ".test"),
    *(".lan", ".home", ".corp", ".svc"),
)
ASKED_HEADERS = ("authorization", "x-api-key", "api-key", "idempotency-key")  # no page sends these unasked


class Origins:
    """The rule for one server. Ports do not count: other servers of a host are its owner's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._public_name = _name_in(settings.public_base_url or "")

    @property
    def has_any(self) -> bool:
        """Whether the settings name any."""
        return bool(self._settings.cors_origins)

    def allows(self, origin: str | None) -> bool:
        """Return whether the settings name the origin of a page."""
        allowed = self._settings.cors_origins
        return origin is not None and ("*" in allowed or origin in allowed)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise Forbidden for what a page of another site sends unasked, or under a name of its own."""
        host, client = headers.get("host", ""), scope.get("client")
        if client is not None and is_trusted(client[0], self._settings):
            host = headers.get("x-forwarded-host", host).partition(",")[0].strip()
        elif not (self._settings.has_keys or self._is_ours(_name(host))):
            raise Forbidden(
                f"without keys this server is not called {host[:100]}; if that is its name, say so in "
                "CASCADE_PUBLIC_BASE_URL"
            )
        origin = headers.get("origin")
        if origin is None or self.allows(origin) or not _is_simple(scope, headers):
            return
        page, name = _name_in(origin), _name(host)
        is_ours = page in (name, self._public_name) or (_is_loopback(page) and _is_loopback(name))
        if page == "" or not is_ours:
            raise Forbidden(
                f"pages of {origin[:100]} may not call this server: CASCADE_CORS_ORIGINS does not name it"
            )

    def _is_ours(self, name: str) -> bool:
        """Return whether no stranger can own a name, or the settings have it."""
        is_private = "." not in name or name.endswith(LOCAL_NAMES) or _address(name) is not None
        return is_private or name == self._public_name


def is_trusted(address: str, settings: Settings) -> bool:
    """Whether an address is that of a proxy whose headers count."""
    client = _address(address)
    return client is not None and any(client in network for network in settings.trusted_proxies)


def _is_simple(scope: Scope, headers: Headers) -> bool:
    """Return whether a browser sends such a request for any page without asking."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_asked = any(name in headers for name in ASKED_HEADERS)
    return scope["method"] == "POST" and kind in SIMPLE_TYPES and not is_asked


def _name_in(url: str) -> str:
    """Return the host name of a URL or an origin; "" for `null`, the origin of files and sandboxes."""
    return _name(url.partition("://")[2].partition("/")[0])


def _name(host: str) -> str:
    """Return the name or address in HOST:PORT, in lower case, without brackets and final dot."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return host.lower()


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" or name.endswith(".localhost") or (address is not None and address.is_loopback)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
