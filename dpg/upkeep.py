"""What Python and the C library do with memory while an experiment runs."""

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # Of mallopt(3).
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Give memory that was freed to the next tensor, not to the system, which would clear every page of it again.

    A GRPO step frees and takes again all its activations. For the rest of the process; does nothing but under glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, _LARGEST)
        mallopt(_MMAP_THRESHOLD, _LARGEST)


def forget_what_stays() -> None:
    """Leave what there is to no later search for cycles: once everything is imported, a tenth of a second for each."""
    gc.freeze()


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles inside: each looks through the million objects that the libraries are made of.

    For what makes many objects that stay, or hold none of each other: imports, syntax trees. Not for training, whose
    cycles may hold tensors.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
