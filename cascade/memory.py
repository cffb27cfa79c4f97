"""Keeps freed memory with the process, for programs that allocate large tensors again and again on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Tell glibc not to return freed blocks to the system.

    Otherwise every large activation is mapped and cleared by the kernel anew, which costs up to half of the
    time of a step. Does nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
