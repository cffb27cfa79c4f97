"""A server on a disk that really is full: a small one, in a mount namespace of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE = ("unshare", "--user", "--map-root-user", "--mount")


def test_a_full_disk_is_told_to_everybody_and_loses_nothing(tmp_path: Path) -> None:
    mount = ("mount", "-t", "tmpfs", "-o", "size=6m", "none", str(tmp_path))
    try:
        allowed = subprocess.run([*ALONE, *mount], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here, so no disk can be filled")
    if allowed.returncode:
        pytest.skip(f"no disk can be mounted here to be filled: {allowed.stderr.strip()}")
    program = [sys.executable, "-m", "tests.app.full_disk", str(tmp_path)]
    script = f"{' '.join(mount)} && exec {' '.join(program)}"
    run = subprocess.run(
        [*ALONE, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "new: 507, ready: 503, up: 200",
        "with room: 200, ready: 200",
        "who waited: 507, 507, ready: 503",
        "with room: succeeded, succeeded",
        "left unfinished: 0",
        "start: there is no space left",
    ]
