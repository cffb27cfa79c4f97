"""The `Prefer` header (RFC 7240): whether a caller waits for its pictures, and how long."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_SECONDS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Preference:
    """The preferences in `Prefer` that this server honours."""

    is_async: bool = False
    wait_seconds: int | None = None

    @property
    def may_outlive_the_call(self) -> bool:
        """Whether the answer may come before the pictures."""
        return self.is_async or self.wait_seconds is not None

    @property
    def patience_seconds(self) -> int:
        """Seconds to wait before the unfinished job is the answer."""
        return self.wait_seconds or 0

    @property
    def applied(self) -> str:
        """Value of `Preference-Applied` in an answer that honoured it."""
        return "respond-async" if self.wait_seconds is None else f"wait={self.wait_seconds}"


def parse_prefer(lines: Iterable[str]) -> Preference:
    """Parse all `Prefer` lines. The first of a name counts; malformed ones are ignored."""
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
    """Return the value of a bare word or a quoted string; None for anything else."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = value[1:-1]
    elif len(value.split()) > 1:
        return None
    return None if '"' in value else value
