"""Rate limit of picture requests per key and minute, counted by this server alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from app.api_keys import ApiKey
from app.errors import RateLimited

WINDOW_SECONDS = 60


@dataclass(slots=True)
class _Window:
    began: float
    num_requests: int = 0


class RateLimit:
    """A fixed window for each caller, which begins with its first request."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def take(self, tenant: str, key: ApiKey | None = None) -> dict[str, str]:
        """Count a request and return the headers about the limit. Raises RateLimited beyond it.

        A key with a limit of its own is counted by itself.
        """
        limit, caller = self._per_minute, tenant
        if key is not None and key.rate_limit is not None:
            limit, caller = key.rate_limit, key.sha256.hex()
        if limit is None:
            return {}
        now = self._clock()
        window = self._windows.get(caller)
        if window is None or now - window.began >= WINDOW_SECONDS:
            window = self._windows[caller] = _Window(now)
        seconds_left = max(1, round(window.began + WINDOW_SECONDS - now))
        is_over = window.num_requests >= limit
        window.num_requests += not is_over
        headers = _headers(limit, limit - window.num_requests, seconds_left)
        if is_over:
            retry_after_seconds = min(seconds_left, WINDOW_SECONDS - 1)
            raise RateLimited(
                f"{limit} requests a minute are taken, not more; try again in {retry_after_seconds} seconds",
                headers={**headers, "Retry-After": str(retry_after_seconds)},
            )
        return headers


def _headers(limit: int, left: int, seconds: int) -> dict[str, str]:
    """Return the limit in OpenAI's headers and in those of the IETF's draft."""
    return {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": "1m0s" if seconds == WINDOW_SECONDS else f"{seconds}s",
        "RateLimit-Policy": f'"images";q={limit};w={WINDOW_SECONDS}',
        "RateLimit": f'"images";r={left};t={seconds}',
    }
