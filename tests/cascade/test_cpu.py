import pytest
import torch

from cascade.cpu import suit_threads
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
