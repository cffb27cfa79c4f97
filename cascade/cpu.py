"""CPU settings for a program that owns its process; the library itself applies none of them."""

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cascade.models import Models

_NICENESS = 5  # above that of the parent process
_SMALL = 50_000_000  # parameters
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Tell glibc not to return freed blocks to the system.

    Otherwise the kernel maps and clears the large activations of a batch anew in every step: a fifth of the
    time of eight rows of the embedded Stage B. A single picture gains nothing. With another C library, this
    does nothing.
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

    Operations of the embedded checkpoint take microseconds, so sharing them between threads gains little. If
    another process wants the same core, each join of the threads costs a scheduler time slice: a picture of
    half a second was seen to take half a minute.
    """
    import torch

    stages = (models.stage_a, models.stage_b, models.stage_c)
    num_parameters = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
    if models.device.type == "cpu" and num_parameters < _SMALL:
        torch.set_num_threads(1)


def give_way(device: "torch.device") -> None:
    """Lower the priority below that of the parent process if networks run on the CPU.

    They take all the time they can get, and a server would wait whole scheduler time slices before it could
    answer. Applies to this thread and those that it starts.
    """
    if device.type == "cpu":
        parent, own = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (os.getppid(), 0))
        os.setpriority(os.PRIO_PROCESS, 0, max(own, parent + _NICENESS))
