"""An S3 of our own: rclone, which serves a folder with S3's protocol."""

import os
import secrets
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KEY, SECRET = "tester", "a secret of the tests"
PATIENCE_SECONDS = 30.0
RCLONE = Path(sysconfig.get_path("scripts")) / "rclone"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class S3:
    """A server on a folder, whose own folders are the buckets. It can be stopped and started again."""

    folder: Path
    port: int = field(default_factory=_free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def environment(self) -> dict[str, str]:
        """What tells a client of it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def make_bucket(self, name: str) -> Path:
        """Make an empty bucket; returns its folder."""
        (self.folder / name).mkdir()
        return self.folder / name

    def start(self) -> None:
        """Serve, from when this returns."""
        options = [
            f"--addr=127.0.0.1:{self.port}",
            f"--auth-key={KEY},{SECRET}",
            "--config=/dev/null",
            "--dir-cache-time=1ms",  # it sees what tests do to its folder
        ]
        command = [str(RCLONE), "serve", "s3", *options, str(self.folder)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError("rclone does not serve")

    def hang(self) -> None:
        """Live, and answer nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again, what was asked meanwhile, too."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End, at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass(frozen=True)
class TestBucket:
    """A bucket, and the folder of its objects."""

    __test__ = False

    s3: S3
    url: str
    folder: Path

    def keys(self) -> list[str]:
        """The keys of all its objects."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in files)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = S3(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestBucket]:
    """An empty bucket, which the environment gives access to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    folder = s3.make_bucket(f"bucket-{secrets.token_hex(8)}")
    yield TestBucket(s3, f"s3://{folder.name}/servers/one", folder / "servers" / "one")
    if s3.process is None:
        s3.start()
