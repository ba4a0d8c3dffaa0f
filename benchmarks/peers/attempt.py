"""What a contender is: it prepares once, and then makes attempts of which a clock sees the part to be compared."""

from collections.abc import Callable, Iterator
from time import perf_counter, process_time
from types import TracebackType
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.peers.cases import Case
from benchmarks.peers.tasks import Batch, Task


class Clock:
    """Adds up the seconds spent inside `with clock:`, on the wall and on all processors."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self._start = (0.0, 0.0)

    def __enter__(self) -> None:
        _finish()
        self._start = perf_counter(), process_time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _finish()
        wall, processors = self._start
        self.seconds += perf_counter() - wall
        self.cpu_seconds += process_time() - processors


def _finish() -> None:
    """Wait for what a GPU has been asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# One run from the initial parameters; returns the gradient of the weights, or None where only training is timed.
Attempt: TypeAlias = Callable[[Clock], Tensor | None]
Contender: TypeAlias = Callable[[Task, Case], Attempt]


def pieces(batch: Batch, num_pieces: int) -> Iterator[Batch]:
    """The micro-batches of `batch`, of equal sizes."""
    size = len(batch["index"]) // num_pieces
    for start in range(0, size * num_pieces, size):
        yield {name: value[start : start + size] for name, value in batch.items()}
