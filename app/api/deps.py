"""Dependencies of routes: the parts of the server, API keys, request bodies, and the public base URL."""

import asyncio
import base64
import binascii
import re
from codecs import BOM_UTF8
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from app.api.gateway import Exchange
from app.api.key_ring import KeyRing
from app.api.limits import RateLimit
from app.api.origins import is_trusted
from app.api.tracing import Tracing
from app.api.uploads import Uploads
from app.api.values import LONG_BYTES, parse_json, require_few
from app.errors import (
    ClientGone,
    InvalidRequest,
    PayloadTooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from app.jobs.dispatcher import Dispatcher
from app.jobs.store import JobStore
from app.logs import Logger
from app.metrics import Metrics
from app.outbound import Outbound
from app.settings import Settings
from app.storage.credentials import Credentials
from app.storage.images import ImageStore
from app.storage.inputs import InputStore
from app.storage.loras import InstalledLoRAs
from app.storage.signing import Signer


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of one server, built by `create_app` and handed to the routes."""

    settings: Settings
    store: JobStore
    dispatcher: Dispatcher
    images: ImageStore
    inputs: InputStore
    signer: Signer
    credentials: Credentials
    outbound: Outbound
    uploads: Uploads
    keys: KeyRing
    limit: RateLimit
    encoders: Executor  # encoding and other work that must not block the event loop
    storage: Executor  # waiting for disks, or for a bucket
    reader: Executor  # one thread for pictures from outside: decoding one may take 300 MB
    loras: InstalledLoRAs
    metrics: Metrics
    tracing: Tracing
    logger: Logger
    version: str
    clock: Callable[[], float]  # seconds since 1970


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _exchange(request: Request) -> Exchange:
    exchange: Exchange = request.state.exchange
    return exchange


TheServices = Annotated[Services, Depends(_services)]
TheExchange = Annotated[Exchange, Depends(_exchange)]


async def authenticate(request: Request, services: TheServices, exchange: TheExchange) -> None:
    """Raise Unauthorized for a request without a configured key, if there are any."""
    if not services.settings.has_keys:
        return
    offered = list(_offered_keys(request))
    key = services.keys.find(offered)
    if key is None:
        raise Unauthorized(
            "this API key is not known here" if offered else "an API key is needed: Authorization: Bearer KEY"
        )
    if key.expires_at is not None and key.expires_at <= services.clock():
        raise Unauthorized("this API key has expired")
    exchange.key = key


async def count_request(services: TheServices, exchange: TheExchange) -> None:
    """Count a request for pictures; raise RateLimited beyond the limit. Runs after `authenticate`."""
    exchange.headers.update(services.limit.take(exchange.tenant, exchange.key))


def _offered_keys(request: Request) -> Iterator[bytes]:
    """Yield every key that the request carries, in any of the forms that clients use."""
    scheme, _, value = request.headers.get("authorization", "").strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        yield value.encode("latin-1")
    elif scheme.lower() == "basic" and value:
        try:
            _, _, password = base64.b64decode(value, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            password = b""
        if password:
            yield password
    for name in ("x-api-key", "api-key"):
        if key := request.headers.get(name, "").strip():
            yield key.encode("latin-1")


async def read_json_object(request: Request, services: Services, *, or_form: bool = False) -> dict[str, Any]:
    """Read the body, up to the limit, as a JSON object. `or_form`: errors name forms as allowed, too."""
    _require_json(request, or_form=or_form)
    return await parse_object(await read_body(request, services, services.settings.max_body_bytes), services)


async def read_json_or_null(request: Request, services: Services) -> dict[str, Any] | None:
    """Read the body as a JSON object; None if it is `null` or empty."""
    body = await read_body(request, services, services.settings.max_body_bytes)
    return None if body.strip() in (b"", b"null") else await parse_object(body, services)


def _require_json(request: Request, *, or_form: bool) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", kind):
        kinds = "JSON or a multipart form" if or_form else "JSON"
        types = "application/json or multipart/form-data" if or_form else "application/json"
        raise UnsupportedMediaType(f"the body must be {kinds}: send Content-Type: {types}")


async def read_body(request: Request, services: Services, limit_bytes: int) -> bytes:
    """Read the raw body, no further than the limit."""
    refuse_compressed(request)
    async with services.uploads.reading(services.settings.body_timeout):
        return b"".join([chunk async for chunk in bounded_stream(request, limit_bytes)])


async def parse_object(body: bytes, services: Services) -> dict[str, Any]:
    """Parse a body as a JSON object, in a thread if it is long. Raises InvalidRequest."""
    if len(body) <= LONG_BYTES:
        return _parse_object(body)
    return await asyncio.get_running_loop().run_in_executor(services.encoders, _parse_object, body)


def refuse_compressed(request: Request) -> None:
    """Refuse a compressed body, since its decompressed size is not known in advance."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed")


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        members = parse_json(body.removeprefix(BOM_UTF8))
    except ValueError as error:
        hint = "; a character is cut in half there" if "escape" in str(error) else ""
        raise InvalidRequest(f"the body is not valid JSON: {error}{hint}", code="invalid_json") from None
    if not isinstance(members, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_type")
    require_few(members)
    return members


async def bounded_stream(request: Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the body, no further than the limit. Raises PayloadTooLarge and ClientGone."""
    too_large = PayloadTooLarge(f"the body must be at most {limit_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise too_large
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > limit_bytes:
                raise too_large
            yield chunk
    except ClientDisconnect:
        raise ClientGone("the caller left while sending the body") from None


_ANYWHERE = re.compile(r"^(0\.0\.0\.0|\[::\])(?=$|:)")  # bound to, but not callable
_HOST = re.compile(r"[A-Za-z0-9.\-_]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")


def public_base(request: Request, settings: Settings) -> str:
    """Return the base of this server's URLs for its callers, as `https://host:port`."""
    if settings.public_base_url is not None:
        return settings.public_base_url
    scheme = request.url.scheme
    host = request.headers.get("host", "")
    if request.client is not None and is_trusted(request.client.host, settings):
        scheme = request.headers.get("x-forwarded-proto", scheme).partition(",")[0].strip()
        host = request.headers.get("x-forwarded-host", host).partition(",")[0].strip()
    if scheme not in ("http", "https") or not _HOST.fullmatch(host):
        raise InvalidRequest("the Host header is missing or malformed, so no URL can be given")
    return f"{scheme}://{_ANYWHERE.sub(_here, host)}"


def _here(anywhere: re.Match[str]) -> str:
    return "[::1]" if ":" in anywhere[1] else "127.0.0.1"
