"""The memory of this process, as Linux and glibc count it, or as torch counts that of a GPU."""

import ctypes
import gc
import resource
from abc import ABC, abstractmethod
from pathlib import Path

import torch


class Meter(ABC):
    """What an attempt takes of a memory."""

    @abstractmethod
    def give_back(self) -> None:
        """Return to the system what is free: allocators keep freed blocks, and an attempt would reuse them unseen."""

    @abstractmethod
    def restart_peak(self) -> float:
        """Megabytes that are taken now; the peak counts from here."""

    @abstractmethod
    def peak(self) -> float:
        """Megabytes that were taken at the most since `restart_peak`."""


def of(device: str, gigabytes: float) -> Meter:
    """The meter of a device, whose allocations beyond `gigabytes` fail, with an error that a contender can meet."""
    if device == "cpu":
        size = int(gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        return Resident()
    torch.cuda.set_per_process_memory_fraction(min(gigabytes * 1e9 / torch.cuda.mem_get_info()[1], 1.0))
    return Allocated()


class Resident(Meter):
    """Resident memory."""

    def give_back(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def restart_peak(self) -> float:
        Path("/proc/self/clear_refs").write_text("5")
        return _megabytes("VmRSS")

    def peak(self) -> float:
        return _megabytes("VmHWM")


class Allocated(Meter):
    """Tensors on a GPU."""

    def give_back(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def restart_peak(self) -> float:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e6


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3
