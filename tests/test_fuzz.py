"""Requests of every kind, good and bad, made from `/openapi.json`: nothing may end in an error of ours."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server_process import ServerProcess, ending

CASES = 10_000
MOST_EXAMPLES = 400  # of one operation; the fewest that make `CASES`, with some to spare
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "allow_header_conformance",
)
SMALL = {"max_pixels": 64 * 64, "max_images": 1}  # valid requests are drawn, each in a tenth of a second


@pytest.mark.slow
@pytest.mark.parametrize("has_key", [False, True])
def test_no_request_makes_a_server_error_or_an_answer_that_is_not_described(
    tmp_path: Path, *, has_key: bool
) -> None:
    log, report = tmp_path / "server.log", tmp_path / "report.json"
    settings = SMALL | ({"api_keys": "secret"} if has_key else {})
    with ending(ServerProcess.ours(tmp_path / "data", log, **settings)) as server:
        server.start()
        asyncio.run(server.until_ready())
        words = [
            *(Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--max-examples", str(MOST_EXAMPLES), "--workers", "2"),
            *("--continue-on-failure", "--generation-database", "none", "--warnings", "off"),
            *("--report", "json", "--report-json-path", report),
            *(("--header", "Authorization: Bearer secret") if has_key else ()),
        ]
        told = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-5000:]
    cases = json.loads(report.read_text())["test_cases"]
    assert cases["generated"] >= CASES
    assert cases["unique_failures"] == cases["errored"] == 0
    assert '"level": "error"' not in log.read_text()
