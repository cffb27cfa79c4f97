"""JSON from outside as values: no more of them than a request needs, as each may be a mistake to be told."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from app.errors import InvalidRequest

LONG_BYTES = 64 * 1024  # read off the event loop from here on
MAX_MEMBERS = 200  # of any object or list
MAX_VALUES = 2000  # in all
MAX_MARKS = 200_000  # what begins a value; prompts and pictures have some too


def parse_json(text: bytes) -> Any:
    """The value that a text stands for. Raises ValueError, and InvalidRequest before it would take long."""
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_MARKS:
        raise InvalidRequest(f"the body must have at most {MAX_MARKS} of the characters '[', '{{' and ','")
    return from_json(text, allow_inf_nan=False)


def require_few(members: dict[str, Any]) -> None:
    """Raises InvalidRequest with the place of an object or list in `members` that has too many members."""
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
    """Those members that are not null, which counts as absent, in objects inside them too."""
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
    """A name that a caller chose, fit for a line of text."""
    return name if name.isprintable() and len(name) <= 64 else ascii(name[:64])


def pointer(names: Sequence[str]) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


def _too_many(path: Sequence[str], words: str) -> InvalidRequest:
    names = [printable(name) for name in path]
    message = f"{'.'.join(names) or 'the body'} {words}"
    if not names:
        return InvalidRequest(message)
    return InvalidRequest(message, param=names[0], places=[(pointer(names), message)])
