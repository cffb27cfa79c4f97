"""`Idempotency-Key`: submitting twice is submitting once, if it is the same request."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from app.errors import InvalidRequest
from app.jobs.keys import Idempotency

HEADER = "Idempotency-Key"
_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")


def read_key(request: Request) -> str | None:
    """The key, bare or a quoted string of structured fields; None when there is none."""
    lines = request.headers.getlist(HEADER)
    if not lines:
        return None
    key = lines[0].strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = re.sub(r'\\(["\\])', r"\1", key[1:-1])
    if len(lines) > 1 or not _KEY.fullmatch(key):
        raise InvalidRequest(f"{HEADER} must be one text of 1 to 255 visible characters", param=HEADER)
    return key


def idempotency_of(
    request: Request, members: Mapping[str, Any], output_format: str, ttl_seconds: float
) -> Idempotency | None:
    """What the key stands for: method, path, canonical body and format of the files. None without a key."""
    key = read_key(request)
    if key is None:
        return None
    given = {name: value for name, value in members.items() if value is not None}
    body = json.dumps(given, sort_keys=True, separators=(",", ":"))
    text = f"{request.method}\n{request.url.path}\n{output_format}\n{body}"
    return Idempotency(key, hashlib.sha256(text.encode()).hexdigest(), ttl_seconds)
