"""`Idempotency-Key`: sending the same request twice submits it once."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from app.errors import InvalidRequest
from app.jobs.keys import Idempotency
from app.schemas import GenerationRequest

HEADER = "Idempotency-Key"
PICTURES = ("image", "images", "mask", "image_prompts", "control")  # members that hold pictures
_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")


def read_key(request: Request) -> str | None:
    """Return the key, which is bare or a structured-field string, or None. Raises InvalidRequest."""
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
    request: Request, members: Mapping[str, Any], generation: GenerationRequest, ttl_seconds: float
) -> Idempotency | None:
    """Return the key and a digest of method, path, canonical body and output format; None without a key.

    Pictures count by their digests, in whatever form they were sent.
    """
    key = read_key(request)
    if key is None:
        return None
    given = {name: value for name, value in members.items() if value is not None and name not in PICTURES}
    pictures = generation.model_dump(include=set(PICTURES), exclude_defaults=True, mode="json")
    # `repr` leaves out the content of file parts that nobody reads, so they all count as equal.
    body = json.dumps({**given, **pictures}, sort_keys=True, separators=(",", ":"), default=repr)
    text = f"{request.method}\n{request.url.path}\n{generation.output_format}\n{body}"
    return Idempotency(key, hashlib.sha256(text.encode()).hexdigest(), ttl_seconds)
