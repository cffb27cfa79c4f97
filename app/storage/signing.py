"""Signed, expiring names: only a holder of one may fetch the file, and only for a while."""

import base64
import hashlib
import hmac
import os
import secrets
import string
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from app.errors import Forbidden, Gone, SettingsError

SECRET_BYTES = 32


class Signer:
    """Signs names with HMAC-SHA256, each with an expiry time in whole Unix seconds."""

    def __init__(self, secret: bytes, ttl_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._ttl_seconds = ttl_seconds
        self._clock = clock

    def sign(self, name: str) -> str:
        """Return the query string that gives access to `name` for the life of a URL."""
        expires = int(self._clock() + self._ttl_seconds)
        return f"exp={expires}&sig={self._signature(name, str(expires))}"

    def verify(self, name: str, expires: str, signature: str) -> int:
        """Return the seconds for which the signature is still valid. Raises Forbidden or Gone."""
        genuine = self._signature(name, expires).encode()
        if not hmac.compare_digest(genuine, signature.encode("utf-8", "replace")):
            raise Forbidden(
                "the signature of this URL is wrong; ask for the picture or job again to get a new one"
            )
        left = int(expires) - self._clock()
        if left <= 0:
            raise Gone("this URL has expired; ask for the picture or job again to get a new one")
        return int(left)

    def webhook_secret(self, tenant: str) -> str:
        """Return the secret that signs the webhooks of a tenant, in the form of Standard Webhooks."""
        key = hmac.digest(self._secret, b"webhooks", hashlib.sha256)
        secret = hmac.digest(key, tenant.encode(), hashlib.sha256)
        return f"whsec_{base64.b64encode(secret).decode()}"

    def _signature(self, name: str, expires: str) -> str:
        message = f"{name}\n{expires}".encode("utf-8", "replace")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


def load_secret(path: Path, chosen: SecretStr | None = None) -> bytes:
    """Return the secret made of the text `chosen`, or else the one in `path`.

    The file is created (readable by the owner alone) if it does not exist. Raises SettingsError when it holds
    something else.
    """
    if chosen is not None:
        return hashlib.sha256(chosen.get_secret_value().encode()).digest()
    if not path.exists():
        _make_secret(path)
    return _read_secret(path)


def _make_secret(path: Path) -> None:
    """Create `path` atomically; if another process was faster, its secret stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".secret-", suffix=".partial") as file:
        file.write(secrets.token_hex(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            path.hardlink_to(file.name)


def _read_secret(path: Path) -> bytes:
    text = path.read_text(errors="replace").strip()
    if len(text) != 2 * SECRET_BYTES or not set(text) <= set(string.hexdigits):
        raise SettingsError(f"{path} holds no secret of this server; delete it, and the URLs given out end")
    return bytes.fromhex(text)
