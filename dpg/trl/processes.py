"""Work that several processes share, in which an error of one is raised in all: none waits for another for ever."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class OtherProcessError(Exception):
    """Another process failed; the message says which, and how."""


def rank() -> int:
    """The number of this process; 0 if it is alone."""
    return dist.get_rank() if _several() else 0


def gathered(compute: Callable[[], T]) -> list[T]:
    """What `compute` returns in every process, by rank.

    Raises:
        OtherProcessError: if it raises in another process; here, its own error.
    """
    if not _several():
        return [compute()]
    mine, error = _attempt(compute)
    outcomes = [(mine, _told(error))] * dist.get_world_size()
    dist.all_gather_object(outcomes, (mine, _told(error)))
    if error is not None:
        raise error
    for other, (_, message) in enumerate(outcomes):
        _raise(other, message)
    return [value for value, _ in outcomes]


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` returns in the first process, which alone calls it.

    Raises:
        OtherProcessError: if it raises there; in the first process, its own error.
    """
    if not _several():
        return compute()
    mine, error = _attempt(compute) if rank() == 0 else (None, None)
    outcome = [(mine, _told(error))]
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    value, message = outcome[0]
    _raise(0, message)
    return value


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _attempt(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return compute(), None
    except Exception as error:  # Whatever it is, the others must hear of it.
        return None, error


def _told(error: Exception | None) -> str | None:
    """An error as text: not every exception can be sent."""
    return None if error is None else f"{type(error).__name__}: {error}"


def _raise(number: int, message: str | None) -> None:
    if message is not None:
        raise OtherProcessError(f"process {number} failed: {message}")
