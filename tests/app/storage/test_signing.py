"""Signatures of URLs and the secret behind them."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from app.errors import Forbidden, Gone, SettingsError
from app.storage.signing import Signer, load_secret


def signed(signer: Signer, name: str) -> tuple[str, str]:
    query = parse_qs(signer.sign(name))
    return query["exp"][0], query["sig"][0]


def test_a_signature_opens_its_name_for_a_while() -> None:
    now = 1000.0
    signer = Signer(b"s" * 32, ttl_seconds=60, clock=lambda: now)
    expires, signature = signed(signer, "a.png")
    assert expires == "1060"
    assert len(signature) == 64
    assert signer.verify("a.png", expires, signature) == 60
    now = 1059.5
    assert signer.verify("a.png", expires, signature) == 0
    now = 1060.0
    with pytest.raises(Gone):
        signer.verify("a.png", expires, signature)


def test_nothing_else_fits() -> None:
    signer = Signer(b"s" * 32, ttl_seconds=60)
    expires, signature = signed(signer, "a.png")
    for name, end, sig in [
        ("b.png", expires, signature),
        ("a.png", expires + "0", signature),
        ("a.png\n" + expires, "", signature),
        ("a.png", expires, signature[:-1]),
        ("a.png", expires, signature + "0"),
        ("a.png", expires, "é"),
        ("a.png", "\ud800", "\ud800"),
    ]:
        with pytest.raises(Forbidden):
            signer.verify(name, end, sig)
    with pytest.raises(Forbidden):
        Signer(b"t" * 32, ttl_seconds=60).verify("a.png", expires, signature)


def test_the_secret_is_made_once_and_only_for_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(path) == secret
    assert load_secret(tmp_path / "other") != secret


@pytest.mark.parametrize("content", ["", "abc", "no hex at all" * 10])
def test_a_broken_secret_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secret"
    path.write_text(content)
    with pytest.raises(SettingsError, match=rf"^{path} holds no secret of this server; delete it.*$"):
        load_secret(path)


def test_a_secret_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            load_secret(tmp_path / "secret")
    assert list(tmp_path.iterdir()) == []


def test_processes_that_start_together_share_a_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(load_secret, [tmp_path / "secret"] * 50))
    assert len(secrets) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
