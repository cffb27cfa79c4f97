"""The `Prefer` header (RFC 7240): whether a caller waits for its pictures, and how long."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PREFERENCE = re.compile(
    r"""\s*([!#$%&'*+\-.^_`|~0-9A-Za-z]+)\s*(?:=\s*("[^"]*"|[^\s;,"]*)\s*)?(?:;[^,]*)?"""
)
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
        if match := _PREFERENCE.fullmatch(part):
            found.setdefault(match[1].lower(), (match[2] or "").strip('"'))
    wait = found.get("wait", "")
    return Preference(
        is_async=found.get("respond-async") == "",
        wait_seconds=int(wait) if _SECONDS.fullmatch(wait) else None,
    )
