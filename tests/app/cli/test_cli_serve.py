import socket
from pathlib import Path

import pytest

from tests.app.cli.running import Run


def test_a_busy_port_is_one_line(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        outcome = run("serve", "--port", port, "--data-dir", tmp_path / "data")
    assert outcome.status == 2
    assert outcome.err == (
        f"cascade: 127.0.0.1:{port} is already in use; choose another with --host and --port\n"
    )


def test_a_model_that_cannot_be_loaded_stops_the_server(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    outcome = run("serve", "--port", 0, "--data-dir", data, "--model", tmp_path / "nothing")
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("cascade: ")
    assert str(tmp_path / "nothing") in last


def test_a_public_address_needs_a_key_or_a_word(run: Run, tmp_path: Path) -> None:
    outcome = run("serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", tmp_path / "data")
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert "CASCADE_API_KEYS" in line
    assert "--allow-anonymous" in line or "CASCADE_ALLOW_ANONYMOUS" in line


def test_a_wrong_setting_of_the_server_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_PROT", "9000")
    outcome = run("serve", "--port", "0")
    assert outcome.status == 2
    assert "CASCADE_PROT is no setting; did you mean CASCADE_PORT?" in outcome.err
