import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cascade.cpu import give_way, keep_freed_memory, suit_threads
from tests.cascade.small_models import small_cascade


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_small_networks_run_on_one_thread() -> None:
    torch.set_num_threads(2)
    suit_threads(small_cascade())
    assert torch.get_num_threads() == 1


def test_large_networks_keep_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr("cascade.cpu._SMALL", 10)
    suit_threads(small_cascade())
    assert torch.get_num_threads() == 2


def test_freed_memory_is_kept() -> None:
    """What was freed is used again without asking the kernel for new pages."""
    keep_freed_memory()
    size = 48 * 1024**2  # beyond what glibc keeps by itself
    _ = b"x" * size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        _ = b"x" * size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < size // resource.getpagesize()


def test_a_network_on_a_processor_gives_way_to_the_process_that_started_it_and_only_once() -> None:
    parent, own = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (os.getppid(), 0))
    with ThreadPoolExecutor(1) as thread:

        def niceness_on(device: str) -> int:
            thread.submit(give_way, torch.device(device)).result()
            return thread.submit(os.getpriority, os.PRIO_PROCESS, 0).result()

        assert niceness_on("cuda") == own
        assert niceness_on("cpu") == niceness_on("cpu") == min(max(own, parent + 5), 19)
