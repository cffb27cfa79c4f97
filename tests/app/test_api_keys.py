"""The file of keys: what is right in it, what is told of mistakes, and that it is replaced as a whole."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.api_keys import KeyEntry, changing, new_key, read_entries, write_entries
from app.errors import SettingsError

DIGEST = "0123456789abcdef" * 4


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ends = datetime(2027, 1, 31, 12, tzinfo=UTC)
    entries = [
        KeyEntry(name="web", sha256=DIGEST),
        KeyEntry(name="gäst@home", sha256=DIGEST[::-1], expires=ends, rate_limit=5),
    ]
    write_entries(path, entries)
    assert read_entries(path) == entries
    assert path.stat().st_mode & 0o777 == 0o600
    key = read_entries(path)[1].key()
    assert (key.name, key.sha256.hex(), key.rate_limit) == ("gäst@home", DIGEST[::-1], 5)
    assert key.expires_at == ends.timestamp()
    path.chmod(0o640)
    write_entries(path, [])
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_those_who_change_a_file_at_the_same_time_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    link = tmp_path / "link.json"
    write_entries(path, [])
    link.symlink_to(path)

    def add(number: int) -> None:
        with changing((path, link)[number % 2]) as target:
            entries = read_entries(target)
            time.sleep(0.005)
            write_entries(target, [*entries, KeyEntry(name=f"n{number}", sha256=DIGEST)])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(16)))
    assert {entry.name for entry in read_entries(path)} == {f"n{number}" for number in range(16)}
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[", ["must be a JSON list of keys", "invalid JSON"]),
        ("{}", ["must be a JSON list of keys"]),
        ('["web"]', ["entry 1:"]),
        ([{"name": "web"}], ["entry 1 sha256: field required"]),
        ([{"name": "web", "sha256": DIGEST}, {"name": "x", "sha256": "12"}], ["entry 2 sha256", "64 hexa"]),
        ([{"name": "a b", "sha256": DIGEST}], ["entry 1 name: must be 1 to 100 letters"]),
        ([{"name": "", "sha256": DIGEST}], ["entry 1 name: must be 1 to 100 letters"]),
        (
            [{"name": "w", "sha256": DIGEST, "expires": "2027-01-31T00:00:00"}],
            ["entry 1 expires", "timezone"],
        ),
        ([{"name": "w", "sha256": DIGEST, "rate_limit": 0}], ["entry 1 rate_limit", "greater than or equal"]),
        ([{"name": "w", "sha256": DIGEST, "key": "k"}], ["entry 1 key: is no member", "rate_limit"]),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, content: object, told: list[str]) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SettingsError) as caught:
        read_entries(path)
    assert str(path) in str(caught.value)
    assert all(part in str(caught.value) for part in told)


def test_no_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.json: No such file"):
        read_entries(tmp_path / "none.json")


def test_keys_are_long_and_different() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("sc_") and len(key) >= 40 for key in keys)
