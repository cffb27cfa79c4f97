"""The outermost layer around every request: its id, log line, metrics, CORS, OPTIONS, unexpected errors.

Plain ASGI, so that bodies and answers stream through it untouched.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.failures import METHODS, allowed_methods, respond
from app.api.origins import Origins
from app.api_keys import ApiKey
from app.errors import DO_NOT_REPEAT, AppError, Forbidden, InvalidRequest, Overloaded, ShuttingDown
from app.jobs.database import DatabaseAway
from app.logs import Logger
from app.metrics import Metrics

AWAY_SECONDS = 2  # until the database may be back
PART_BYTES = 256 * 1024
CROWDED = "is_crowded"  # in the state of requests on connections beyond the limit
CROWDED_SECONDS = 5  # until there may be fewer connections

_REQUEST_ID = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,199}")
# An absolute target, which a server must accept as a proxy does (RFC 9112, section 3.2.2).
_ABSOLUTE = re.compile(r"^https?://[^/]*/?", re.IGNORECASE)
_HEALTH = {"/healthz", "/readyz"}
_QUIET = {*_HEALTH, "/metrics"}  # polled every few seconds: logged at debug level

EXPOSED_HEADERS = (
    "x-request-id, x-job-id, retry-after, retry-after-ms, location, preference-applied, x-seed, "
    "x-ignored-params, x-resampled-from, x-prompt-truncated, idempotency-replayed, "
    "ratelimit, ratelimit-policy, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests"
)


@dataclass(slots=True)
class Exchange:
    """One request and its answer, as they are logged."""

    request_id: str
    status: int = 0
    key: ApiKey | None = None
    facts: dict[str, object] = field(default_factory=dict)  # what the route adds to the log line
    headers: dict[str, str] = field(default_factory=dict)  # added to the answer, whichever it is

    @property
    def tenant(self) -> str:
        """Owner of the jobs that the caller may see: the name of its key, or "" where there are no keys."""
        return self.key.name if self.key else ""

    @property
    def has_started(self) -> bool:
        """Whether the answer has started, so that no other can be sent."""
        return self.status != 0


class Gateway:
    """ASGI middleware around the whole server."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        server: FastAPI,
        origins: Origins,
        metrics: Metrics,
        logger: Logger,
    ) -> None:
        self._app = app
        self._server = server
        self._origins = origins
        self._metrics = metrics
        self._logger = logger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope["path"] = _ABSOLUTE.sub("/", scope["path"])
        exchange = Exchange(_request_id(headers))
        scope.setdefault("state", {})["exchange"] = exchange
        started = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = exchange.request_id
                answer.update(exchange.headers)
                self._allow_origin(headers, answer)
            for part in _parts(message):
                await send(part)

        try:
            await self._answering(scope, headers, exchange)(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server stops without waiting any longer
            if exchange.has_started:
                raise
            error: AppError = ShuttingDown()
            await respond(error, scope["path"], exchange.request_id)(scope, receive, send_with_headers)
        except DatabaseAway as away:
            self._logger.warning("request refused", request_id=exchange.request_id, reason=str(away))
            if exchange.has_started:
                raise
            error = Overloaded(
                "the database of the jobs does not answer; try again", retry_after_seconds=AWAY_SECONDS
            )
            await respond(error, scope["path"], exchange.request_id)(scope, receive, send_with_headers)
        except Exception as failure:
            cause = failure.__cause__ or failure
            if exchange.has_started and isinstance(cause, AppError):  # such as a picture removed meanwhile
                self._logger.info("answer broken off", request_id=exchange.request_id, reason=str(cause))
                return
            self._logger.exception("request failed", request_id=exchange.request_id)
            if not exchange.has_started:
                error = AppError("the server failed on this request; its log says why", headers=DO_NOT_REPEAT)
                await respond(error, scope["path"], exchange.request_id)(scope, receive, send_with_headers)
        finally:
            self._note(scope, exchange, time.perf_counter() - started)

    def _answering(self, scope: Scope, headers: Headers, exchange: Exchange) -> ASGIApp:
        """Return the app that answers this request, usually the wrapped one."""
        if scope["state"].get(CROWDED) and scope["path"] not in _QUIET:
            crowded = Overloaded(
                "too many connections are open; try again", retry_after_seconds=CROWDED_SECONDS
            )
            return respond(crowded, scope["path"], exchange.request_id)
        if scope["method"] == "OPTIONS":
            return self._options(scope, headers)
        try:
            _check_framing(headers)
            if scope["path"] not in _HEALTH:
                self._origins.check(scope, headers)
        except (Forbidden, InvalidRequest) as error:
            return respond(error, scope["path"], exchange.request_id)
        return self._app

    def _options(self, scope: Scope, headers: Headers) -> Response:
        """Answer OPTIONS for everybody and every path, including CORS preflights."""
        allowed = ", ".join(allowed_methods(self._server, scope))
        response = Response(status_code=204, headers={"Allow": allowed})
        if self._origins.allows(headers.get("origin")) and "access-control-request-method" in headers:
            response.headers["Access-Control-Allow-Methods"] = ", ".join(METHODS)
            response.headers["Access-Control-Allow-Headers"] = headers.get(
                "access-control-request-headers", "*"
            )
            response.headers["Access-Control-Max-Age"] = "600"
        return response

    def _allow_origin(self, headers: Headers, answer: MutableHeaders) -> None:
        if not self._origins.has_any:
            return
        answer.add_vary_header("Origin")
        origin = headers.get("origin")
        if origin is not None and self._origins.allows(origin):
            answer["Access-Control-Allow-Origin"] = origin
            answer["Access-Control-Expose-Headers"] = EXPOSED_HEADERS

    def _note(self, scope: Scope, exchange: Exchange, seconds: float) -> None:
        """Write the log line and the metrics of a request that has ended."""
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = _route_path(scope)
        self._metrics.requests.labels(method, route, str(exchange.status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        log = self._logger.debug if route in _QUIET else self._logger.info
        log(
            "request",
            request_id=exchange.request_id,
            method=method,
            path=scope["path"][:200],
            status=exchange.status,
            seconds=round(seconds, 4),
            **({"key": exchange.key.name} if exchange.key else {}),
            **exchange.facts,
        )


def _check_framing(headers: Headers) -> None:
    """Refuse a body of two lengths, which hides a request from one of two servers (RFC 9112, section 6.1)."""
    if "transfer-encoding" in headers and "content-length" in headers:
        both = "a request must have Content-Length or Transfer-Encoding, not both"
        raise InvalidRequest(both, headers={"Connection": "close"})


def _parts(message: Message) -> Iterator[Message]:
    """Split the message of a long body: sending or buffering it all at once would hold up others."""
    body = message.get("body", b"")
    if len(body) <= PART_BYTES:
        yield message
        return
    for start in range(0, len(body), PART_BYTES):
        end = start + PART_BYTES
        more_body = end < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start:end], "more_body": more_body}


def _request_id(headers: Headers) -> str:
    """Return the first usable request id of the client, else a new one."""
    for name in ("x-request-id", "x-client-request-id"):
        given = headers.get(name, "")
        if _REQUEST_ID.fullmatch(given):
            return given
    return f"req_{secrets.token_hex(12)}"


def _route_path(scope: Scope) -> str:
    """Return the path of the route as declared: a closed set, unlike the requested paths."""
    return getattr(scope.get("route"), "path", None) or "unmatched"
