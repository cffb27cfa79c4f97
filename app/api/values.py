"""Parsing of untrusted JSON, with limits on the number of values, since each may be an error to report."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from app.errors import InvalidRequest

LONG_BYTES = 64 * 1024  # longer texts are parsed off the event loop
MAX_MEMBERS = 200  # of any one object or list
MAX_VALUES = 2000  # in all
MAX_MARKS = 200_000  # characters that begin a value; prompts and pictures contain some too


def parse_json(text: bytes) -> Any:
    """Parse JSON. Raises ValueError, or InvalidRequest for a text that would take long to parse."""
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_MARKS:
        raise InvalidRequest(f"the body must have at most {MAX_MARKS} of the characters '[', '{{' and ','")
    return from_json(text, allow_inf_nan=False)


def require_few(members: dict[str, Any]) -> None:
    """Raise InvalidRequest, naming the place, if an object or list in `members` has too many members."""
    num_values = 0
    places: list[tuple[tuple[str, ...], dict[str, Any] | list[Any]]] = [((), members)]
    while places:
        path, container = places.pop()
        if len(container) > MAX_MEMBERS:
            raise _too_many(path, f"must have at most {MAX_MEMBERS} members, not {len(container)}")
        num_values += len(container)
        if num_values > MAX_VALUES:
            raise _too_many((), f"must have at most {MAX_VALUES} members, those of its members included")
        items = container.items() if isinstance(container, dict) else enumerate(container)
        places += (((*path, str(name)), value) for name, value in items if isinstance(value, dict | list))


def present(members: Mapping[str, Any]) -> dict[str, Any]:
    """Drop members that are null, which counts as absent, also in nested objects."""
    return {name: _present(value) for name, value in members.items() if value is not None}


def _present(value: Any) -> Any:
    match value:
        case dict():
            return present(value)
        case list():
            return [_present(entry) for entry in value]
        case _:
            return value


def printable(name: str) -> str:
    """Return a caller's name in a form that fits into a line of text."""
    return name if name.isprintable() and len(name) <= 64 else ascii(name[:64])


def pointer(names: Sequence[str]) -> str:
    """Return the JSON pointer (RFC 6901) of a path of names."""
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


def _too_many(path: Sequence[str], words: str) -> InvalidRequest:
    names = [printable(name) for name in path]
    message = f"{'.'.join(names) or 'the body'} {words}"
    if not names:
        return InvalidRequest(message)
    return InvalidRequest(message, param=names[0], places=[(pointer(names), message)])
