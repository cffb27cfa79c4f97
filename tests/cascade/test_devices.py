import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cascade.devices import device_name, limit_bytes, peak_bytes, used_bytes

CPU = torch.device("cpu")
NUM_BYTES = 64 * 1024**2


def test_a_cpu_has_a_name() -> None:
    assert device_name(CPU).strip()


def test_the_peak_follows_what_is_used() -> None:
    before = used_bytes(CPU)
    with mmap.mmap(-1, NUM_BYTES) as block:  # fresh pages, whatever an allocator keeps
        block.write(b"1" * NUM_BYTES)
        assert used_bytes(CPU) >= before + NUM_BYTES // 2
    assert peak_bytes(CPU) >= used_bytes(CPU) // 2


@pytest.mark.slow  # imports torch
def test_the_peak_of_a_process_is_not_that_of_its_parent() -> None:
    code = "import torch; from cascade.devices import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    alone = int(subprocess.check_output([sys.executable, "-c", code]))
    much = bytearray(b"x") * (alone + 300_000_000)
    below = int(subprocess.check_output([sys.executable, "-c", code]))
    assert below < 1.2 * alone < len(much)


def test_the_limit_is_beyond_what_is_used_and_within_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) * 1024
    assert used_bytes(CPU) / 2 < limit_bytes(CPU) < total


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.devices._group_limit_bytes", lambda: 1000)
    assert limit_bytes(CPU) == 900
