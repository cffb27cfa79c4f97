"""The `Prefer` header (RFC 7240): whether a caller waits for its pictures, and how long."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_SECONDS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Preference:
    """What of `Prefer` this server knows."""

    is_async: bool = False
    wait_seconds: int | None = None

    @property
    def may_outlive_the_call(self) -> bool:
        """Whether the answer may come before the pictures."""
        return self.is_async or self.wait_seconds is not None

    @property
    def patience_seconds(self) -> int:
        """How long to wait before the job is answered as it stands."""
        return self.wait_seconds or 0

    @property
    def applied(self) -> str:
        """`Preference-Applied` of an answer that followed it."""
        return "respond-async" if self.wait_seconds is None else f"wait={self.wait_seconds}"


def parse_prefer(lines: Iterable[str]) -> Preference:
    """The preferences of all `Prefer` lines. The first of a name counts; what is malformed is ignored."""
    found: dict[str, str] = {}
    for part in ",".join(lines).split(","):
        name, _, value = part.partition(";")[0].partition("=")
        text = _text(value.strip())
        if text is not None:
            found.setdefault(name.strip().lower(), text)
    wait = found.get("wait", "")
    return Preference(
        is_async=found.get("respond-async") == "",
        wait_seconds=int(wait) if _SECONDS.fullmatch(wait) else None,
    )


def _text(value: str) -> str | None:
    """A word, bare or with anything in quotes; None for what is neither."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = value[1:-1]
    elif len(value.split()) > 1:
        return None
    return None if '"' in value else value
