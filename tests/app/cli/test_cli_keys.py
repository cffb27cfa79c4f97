"""`cascade keys`: keys are shown once, listed without giving them away, and revoked by name or digest."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.app.cli.running import Run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def add(run: Run, file: Path, *words: str) -> str:
    outcome = run("keys", "add", file, *words)
    assert outcome.status == 0, outcome.err
    return outcome.out.strip()


def test_a_key_is_printed_once_and_kept_as_its_digest(run: Run, file: Path) -> None:
    key = add(run, file, "web")
    assert key not in file.read_text()
    [entry] = json.loads(file.read_text())
    assert entry == {"name": "web", "sha256": hashlib.sha256(key.encode()).hexdigest()}


def test_keys_are_listed(run: Run, file: Path) -> None:
    key = add(run, file, "web")
    add(run, file, "guest", "--days", "30", "--rate-limit", "7")
    entries = json.loads(file.read_text())
    entries[0]["expires"] = "2020-01-31T00:00:00Z"
    file.write_text(json.dumps(entries))
    outcome = run("keys", "list", file)
    web, guest = outcome.out.splitlines()[1:]
    assert web.split()[:2] == ["web", hashlib.sha256(key.encode()).hexdigest()[:12]]
    assert "2020-01-31 00:00 UTC (expired)" in web
    assert guest.split()[-1] == "7"
    assert key not in outcome.out


def test_keys_are_revoked_by_name_or_by_digest(run: Run, file: Path) -> None:
    old, new, _, _ = (add(run, file, name) for name in ("web", "web", "guest", "guest"))
    digest = hashlib.sha256(old.encode()).hexdigest()
    assert run("keys", "revoke", file, digest[:12]).out == f"revoked web {digest[:12]}\n"
    left = json.loads(file.read_text())
    assert [entry["name"] for entry in left] == ["web", "guest", "guest"]
    assert left[0]["sha256"] == hashlib.sha256(new.encode()).hexdigest()
    run("keys", "revoke", file, "guest")
    assert [entry["name"] for entry in json.loads(file.read_text())] == ["web"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("revoke", "nobody"), "there is no key of nobody"),
        (("revoke", "0"), "there is no key of 0"),
        (("add", "a b"), "must be 1 to 100 letters"),
        (("add", "x", "--days", "0"), "--days: must be at least 1"),
        (("add", "x", "--rate-limit", "0"), "--rate-limit: must be at least 1"),
    ],
)
def test_mistakes_change_nothing(run: Run, file: Path, words: tuple[str, ...], told: str) -> None:
    add(run, file, "web")
    before = file.read_bytes()
    command, *rest = words
    outcome = run("keys", command, file, *rest)
    assert outcome.status == 2
    assert told in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert file.read_bytes() == before


def test_a_wrong_file_is_left_alone(run: Run, file: Path) -> None:
    file.write_text("{}")
    for command in (("add", "web"), ("list",), ("revoke", "web")):
        outcome = run("keys", command[0], file, *command[1:])
        assert outcome.status == 2
        assert "must be a JSON list of keys" in outcome.err
    assert file.read_text() == "{}"
