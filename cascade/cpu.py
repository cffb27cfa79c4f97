"""What a program that owns its process does to run networks well on a CPU; the library does none of it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascade.models import Models

_SMALL = 50_000_000  # parameters


def suit_threads(models: "Models") -> None:
    """Run small networks on one thread.

    Threads share an operation of the embedded checkpoint for microseconds and meet again at its end. That
    gains little, and where another process wants the same core, each meeting costs a slice of the scheduler:
    a picture of half a second was seen to take half a minute.
    """
    import torch

    stages = (models.stage_a, models.stage_b, models.stage_c)
    num_parameters = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
    if models.device.type == "cpu" and num_parameters < _SMALL:
        torch.set_num_threads(1)
