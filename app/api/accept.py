"""Content negotiation: JSON, a picture or events, whichever `Accept` prefers (RFC 9110, 12.5.1)."""

from app.errors import NotAcceptable
from app.schemas import OutputFormat

_FORMATS: dict[str, OutputFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/jpg": "jpeg",
    "image/webp": "webp",
}


def raw_format(accept: str, output_format: OutputFormat) -> OutputFormat | None:
    """Return the format of raw bytes that `accept` prefers, None for JSON. `image/*` means `output_format`.

    Raises NotAcceptable when `accept` allows only picture formats that cannot be made.
    """
    kinds = _by_preference(accept)
    for kind in kinds:
        if kind == "image/*":
            return output_format
        if kind in _FORMATS:
            return _FORMATS[kind]
        if not kind.startswith("image/"):
            return None
    if kinds:
        raise NotAcceptable("pictures can be had as image/png, image/jpeg and image/webp")
    return None


def prefers_events(accept: str) -> bool:
    """Return whether the caller prefers a stream of events."""
    return _by_preference(accept)[:1] == ["text/event-stream"]


def _by_preference(accept: str) -> list[str]:
    """Return the media ranges, best first; ties keep their order, and those of weight 0 are dropped."""
    weighted = []
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((_weight(text[2:]) for text in parameters if text.startswith("q=")), 1.0)
        if kind and weight > 0:
            weighted.append((weight, kind))
    return [kind for _, kind in sorted(weighted, key=lambda pair: -pair[0])]


def _weight(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 1.0
