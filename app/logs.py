"""Structured logs: one line per event, JSON for machines or colours for a terminal.

Loggers are values handed down from `create_app`, so two servers in one process log apart.
"""

import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from app.settings import Settings

Logger = FilteringBoundLogger


def make_logger(settings: Settings, stream: TextIO | None = None) -> Logger:
    """A logger for `stream` (standard error when None). Values are escaped: one event, one line."""
    stream = stream or sys.stderr
    is_console = is_for_people(settings, stream)
    # repr_native_str: a line break or an escape sequence in a value must not reach the terminal.
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            repr_native_str=True,
            pad_event_to=20,
            exception_formatter=structlog.dev.plain_traceback,  # the pretty one shows prompts
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


class Relay(logging.Handler):
    """Inside the block, what a library logs under `name` becomes lines of ours."""

    def __init__(self, name: str, logger: Logger, is_muted: Callable[[], bool] = lambda: False) -> None:
        super().__init__(logging.WARNING)
        self._source = logging.getLogger(name)
        self._logger = logger
        self._is_muted = is_muted

    def __enter__(self) -> Self:
        self._source.addHandler(self)
        self._source.propagate = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.removeHandler(self)
        self._source.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a line on."""
        if not self._is_muted():
            log = self._logger.error if record.levelno >= logging.ERROR else self._logger.warning
            log(record.getMessage(), source=record.name, exc_info=record.exc_info)


def is_for_people(settings: Settings, stream: TextIO) -> bool:
    """Whether lines for the eye are wanted, and not one JSON object each for a program."""
    return settings.log_format == "console" or (settings.log_format == "auto" and stream.isatty())
