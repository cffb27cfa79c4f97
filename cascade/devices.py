"""What a program must know of a device to plan its work: its name and its memory."""

import platform
import resource
from pathlib import Path

import torch

_SHARE = 0.9  # of what is free: others want some, too, and estimates err


def device_name(device: torch.device) -> str:
    """What a device calls itself; what was measured on one holds for its like."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def limit_bytes(device: torch.device) -> int:
    """What this process may grow to on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int((torch.cuda.memory_reserved(device) + free) * _SHARE)
    allowed = _available_bytes() + used_bytes(device)
    return int(min(allowed, _group_limit_bytes() or allowed) * _SHARE)


def used_bytes(device: torch.device) -> int:
    """What this process holds now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    # The figure of getrusage begins with that of the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kilobytes[0] * 1024 if kilobytes else used_bytes(device)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    [kilobytes] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes * 1024


def _group_limit_bytes() -> int | None:
    """What the container is allowed, where there is one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None
