"""What `make` says while it installs, with a pip that only talks."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP_TALKS = """#!/bin/sh
cat <<'END'
Looking in indexes: https://index.example/simple
Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (192.8 MB)
Collecting numpy
  Downloading https://index.example/files/numpy-2.4.6-cp311-linux_x86_64.whl.metadata (62 kB)
  Downloading https://index.example/files/numpy-2.4.6-cp311-linux_x86_64.whl (16.1 MB)
  Downloading cublas-13.1-py3-none-linux_x86_64.whl (1.2 GB)
  Downloading idna-3.20-py3-none-any.whl (7.1 MB)
Installing collected packages: idna, numpy, torch
Successfully installed idna-3.20 numpy-2.4.6 torch-2.13.0
END
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that needs its packages."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    return folder


def make(environment: Path, pip: str) -> subprocess.CompletedProcess[str]:
    (environment / "bin" / "pip").write_text(pip)
    (environment / "bin" / "pip").chmod(0o755)
    # Without what a make outside hands down: the tests are run by one, too.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", f"VENV={environment}", f"{environment}/.server-ready"]
    return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)


def test_the_first_install_says_what_takes_time(environment: Path) -> None:
    run = make(environment, PIP_TALKS)
    assert run.returncode == 0
    first, *rest = run.stdout.splitlines()
    assert first.startswith(f"Installing into {environment}: PyTorch")
    assert rest == [
        "  downloading torch 2.13.0 (192.8 MB)",
        "  downloading numpy 2.4.6 (16.1 MB)",
        "  downloading cublas 13.1 (1.2 GB)",
        "  unpacking 3 packages",
        "Installed",
    ]
    assert (environment / ".server-ready").exists()


def test_an_install_that_fails_is_not_taken_for_done(environment: Path) -> None:
    run = make(environment, "#!/bin/sh\necho 'ERROR: no network' >&2\nexit 1\n")
    assert run.returncode != 0
    assert "ERROR: no network" in run.stderr
    assert "Installed" not in run.stdout
    assert not (environment / ".server-ready").exists()
