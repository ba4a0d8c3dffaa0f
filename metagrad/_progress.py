"""Progress bars, made only where one was asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def ticking(title: str, unit: str, total: int, shown: bool, done: int = 0) -> Iterator[Callable[[], object]]:
    """A function to call after each of `total` units, of which `done` are done."""
    if not shown:
        # Not a disabled bar: that takes a lock too, which a forked process that is killed would never give back.
        yield lambda: None
        return
    with tqdm(total=total, initial=done, desc=title, unit=unit) as bar:
        yield bar.update
