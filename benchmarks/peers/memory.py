"""The memory of this process, as Linux and glibc count it."""

import ctypes
import gc
import resource
from pathlib import Path


def limit(gigabytes: float) -> None:
    """Let allocations beyond this fail, with an error that a contender can be told to have met."""
    size = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def give_back() -> None:
    """Return to the system what is free: glibc keeps freed blocks, and an attempt would reuse them unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def restart_peak() -> float:
    """Megabytes that are resident now; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _megabytes("VmRSS")


def peak() -> float:
    """Megabytes that were resident at the most since `restart_peak`."""
    return _megabytes("VmHWM")


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3
