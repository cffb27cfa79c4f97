"""Structured logs: one line per event, JSON for machines or colours for a terminal.

Loggers are passed down from `create_app`, so two servers in one process log separately.
"""

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from app.settings import Settings

Logger = FilteringBoundLogger

REPEAT_SECONDS = 1.0


def make_logger(settings: Settings, stream: TextIO | None = None) -> Logger:
    """Return a logger for `stream` (standard error when None). Values are escaped: one event, one line."""
    stream = stream or sys.stderr
    is_console = is_for_people(settings, stream)
    # repr_native_str: a line break or an escape sequence in a value must not reach the terminal.
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            repr_native_str=True,
            pad_event_to=20,
            exception_formatter=structlog.dev.plain_traceback,  # the default one shows prompts
        )
        if is_console
        else structlog.processors.JSONRenderer()
    )
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        renderer,
    ]
    if not is_console:
        processors.insert(0, structlog.processors.format_exc_info)
    logger: Logger = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=False,
    )
    return logger


@dataclass(slots=True)
class _Said:
    """A line that was logged, and how many like it have been held back since."""

    level: int
    source: str
    until: float  # when it may be logged again
    num_held: int = 0


class Relay(logging.Handler):
    """Turns what a library logs under `name` into lines of `logger`, as a context manager.

    The same line is logged once a second at most, then with `repeated`, how often it came meanwhile: a line
    that a client can provoke again and again must not fill a disk.
    """

    def __init__(
        self,
        name: str,
        logger: Logger,
        is_muted: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(logging.WARNING)
        self._source = logging.getLogger(name)
        self._logger = logger
        self._is_muted = is_muted
        self._clock = clock
        self._said: dict[str, _Said] = {}

    def __enter__(self) -> Self:
        self._source.addHandler(self)
        self._source.propagate = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.removeHandler(self)
        self._source.propagate = True
        self._say_held(math.inf)

    def emit(self, record: logging.LogRecord) -> None:
        """Log a line, unless the same one was just logged."""
        if self._is_muted():
            return
        text, now = record.getMessage(), self._clock()
        self._say_held(now)
        if text in self._said:
            self._said[text].num_held += 1
            return
        self._said[text] = _Said(record.levelno, record.name, now + REPEAT_SECONDS)
        self._log(record.levelno, text, source=record.name, exc_info=record.exc_info)

    def _say_held(self, now: float) -> None:
        """Forget the lines whose time is over; those that were repeated are logged first, with the number."""
        for text, said in [(text, said) for text, said in self._said.items() if said.until <= now]:
            if said.num_held:
                self._log(said.level, text, source=said.source, repeated=said.num_held)
                said.until, said.num_held = now + REPEAT_SECONDS, 0
            else:
                del self._said[text]

    def _log(self, level: int, text: str, **facts: object) -> None:
        log = self._logger.error if level >= logging.ERROR else self._logger.warning
        log(text, **facts)


def is_for_people(settings: Settings, stream: TextIO) -> bool:
    """Return whether logs are for people to read, and not JSON for programs."""
    return settings.log_format == "console" or (settings.log_format == "auto" and stream.isatty())
