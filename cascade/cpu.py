"""What a program that owns its process does to run networks well on a CPU; the library does none of it."""

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cascade.models import Models

_NICENESS = 5  # beyond that of the process that started us
_SMALL = 50_000_000  # parameters
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Tell glibc not to return freed blocks to the system.

    Activations of a batch are so large that otherwise the kernel maps and clears them anew in every step,
    a fifth of the time of eight rows of the embedded Stage B. A single picture gains nothing. Does nothing
    where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


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


def give_way(device: "torch.device") -> None:
    """Let the process that started this one come first where a network takes the processor itself.

    It takes all that it can get, and a server would wait for whole slices of the scheduler before it says a
    word. Holds for this thread and those that it starts.
    """
    if device.type == "cpu":
        parent, own = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (os.getppid(), 0))
        os.setpriority(os.PRIO_PROCESS, 0, max(own, parent + _NICENESS))
