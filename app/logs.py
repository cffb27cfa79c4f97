"""Structured logs: one line per event, JSON for machines or colours for a terminal.

Loggers are values handed down from `create_app`, so two servers in one process log apart.
"""

import sys
from typing import TextIO

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
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), repr_native_str=True, pad_event_to=20)
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


def is_for_people(settings: Settings, stream: TextIO) -> bool:
    """Whether lines for the eye are wanted, and not one JSON object each for a program."""
    return settings.log_format == "console" or (settings.log_format == "auto" and stream.isatty())
