"""What libraries log becomes lines of ours."""

import io
import json
import logging

from app.logs import Relay, make_logger
from app.settings import Settings


def test_lines_of_a_library_are_passed_on_while_the_block_lasts() -> None:
    stream = io.StringIO()
    library = logging.getLogger("some.library.inside")
    muted = False
    with Relay("some.library", make_logger(Settings(log_format="json"), stream), lambda: muted):
        library.info("chatter")
        library.warning("odd %s", "bytes\nhere")
        try:
            raise ValueError("broken")
        except ValueError:
            library.exception("failed")
        muted = True
        library.error("not now")
    odd, failed = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (odd["event"], odd["level"], odd["source"]) == (
        "odd bytes\nhere",
        "warning",
        "some.library.inside",
    )
    assert (failed["event"], failed["level"]) == ("failed", "error")
    assert "ValueError: broken" in failed["exception"]
    assert logging.getLogger("some.library").handlers == []
    assert logging.getLogger("some.library").propagate


def test_a_line_that_comes_again_and_again_is_counted() -> None:
    stream, now = io.StringIO(), 0.0
    library = logging.getLogger("some.library")
    logger = make_logger(Settings(log_format="json"), stream)
    with Relay("some.library", logger, clock=lambda: now):
        for _ in range(4):
            library.error("no descriptor")
            now += 0.2
        library.warning("something else")
        now = 1.0
        library.error("no descriptor")
        library.error("no descriptor")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["event"], line.get("repeated")) for line in lines] == [
        ("error", "no descriptor", None),
        ("warning", "something else", None),
        ("error", "no descriptor", 3),
        ("error", "no descriptor", 2),
    ]


def test_no_traceback_shows_the_variables_of_the_code_that_failed() -> None:
    for log_format in ("console", "json"):
        stream = io.StringIO()
        prompt = "secret" * 2
        try:
            raise ValueError(f"broken after {len(prompt)} characters")
        except ValueError:
            make_logger(Settings(log_format=log_format), stream).exception("failed")
        assert "broken after 12 characters" in stream.getvalue()
        assert prompt not in stream.getvalue()
