"""Name and memory of a device, as a program needs them to plan its work."""

import platform
import resource
from pathlib import Path

import torch

_SHARE = 0.9  # of the free memory: others need some, too, and estimates err


def device_name(device: torch.device) -> str:
    """Return the model name of a device; measurements on it hold for devices of the same name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def limit_bytes(device: torch.device) -> int:
    """Return the bytes to which this process may grow on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int((torch.cuda.memory_reserved(device) + free) * _SHARE)
    allowed = _available_bytes() + used_bytes(device)
    return int(min(allowed, _group_limit_bytes() or allowed) * _SHARE)


def used_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that this process has held so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    # Not from getrusage, whose figure starts from that of the parent process.
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kilobytes[0] * 1024 if kilobytes else used_bytes(device)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    [kilobytes] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes * 1024


def _group_limit_bytes() -> int | None:
    """Return the memory limit of the container, if there is one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None
