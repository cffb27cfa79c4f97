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
