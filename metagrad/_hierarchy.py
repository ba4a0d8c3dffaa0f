"""Schedules with more structure than one row of slots: the tree of REPLAY, and states in RAM and on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from metagrad._schedule import (
    Action,
    Drop,
    Load,
    Reverse,
    Run,
    Save,
    Schedule,
    best_split,
    binomial,
    evaluations,
    refuse_count,
)


@dataclass(frozen=True)
class Tree(Schedule):
    """REPLAY's lazy tree [engstrom2025]: the run is cut into `arity` parts, each part again, down to single steps.

    Args:
        arity: children of a node; at least 2.

    Cost: about log_k T runs of every step, the forward run included, and at most (k − 1) log_k T + 1 states, for
    k = `arity`. `Binomial` never needs more replays for as many states; this one is here to compare with.
    """

    arity: int

    def __post_init__(self) -> None:
        refuse_count("arity", self.arity, 2, "a tree must branch")

    def reversal(self, start: int, stop: int, kept: int) -> Iterator[Action]:
        length = stop - start
        if length == 1:
            yield Reverse(start)
            return
        starts = sorted({start + length * part // self.arity for part in range(self.arity)})
        for here, following in pairwise(starts):
            yield Run(here, following)
            # A single last step is reversed at once, from the state in hand.
            if following < stop - 1:
                yield Save(following)
        for child, end in reversed(list(pairwise([*starts, stop]))):
            if child != starts[-1]:
                yield Load(child)
            yield from self.reversal(child, end, kept)
            if start < child < stop - 1:
                yield Drop(child)


@dataclass(frozen=True)
class Hierarchical(Schedule):
    """States in RAM and on disk: `Binomial` over both, where states that are kept for long go to disk.

    A state goes to disk where that saves more steps than writing and reading cost; the stretches between states on disk
    are served by RAM.

    Args:
        ram_slots: states kept in RAM at a time.
        disk_slots: states kept on disk at a time, the initial one among them; at least 1.
        write: time to write a state, in units of one step's.
        read: the same for reading one.

    Cost: where writing and reading are free, that of `Binomial(ram_slots + disk_slots)` or close to it.
    """

    ram_slots: int
    disk_slots: int
    write: float = 0.0
    read: float = 0.0

    def __post_init__(self) -> None:
        refuse_count("ram_slots", self.ram_slots, 0, "there cannot be fewer than none")
        refuse_count("disk_slots", self.disk_slots, 1, "the initial state needs one")

    def first(self) -> Save:
        return Save(0, on_disk=True)

    def reversal(self, start: int, stop: int, kept: int) -> Iterator[Action]:
        starts, free = [start], self.disk_slots - kept
        while self._disk_pays(stop - starts[-1], free):
            here = starts[-1]
            split = here + best_split(stop - here, self.ram_slots + 1 + free)
            yield Run(here, split)
            yield Save(split, on_disk=True)
            starts.append(split)
            free -= 1
        yield from binomial(starts[-1], stop, self.ram_slots + 1)
        for number, (here, following) in reversed(list(enumerate(pairwise(starts)))):
            yield Drop(following)
            yield Load(here)
            yield from self.reversal(here, following, kept + number)

    def _disk_pays(self, length: int, free: int) -> bool:
        """Whether to reverse `length` steps with one more of the `free` slots on disk, rather than with RAM alone."""
        if free < 1 or length <= self.ram_slots + 2:
            return False
        slots = self.ram_slots + 1
        split = best_split(length, slots + free)
        if length - split == 1:
            return False
        parts = evaluations(length - split, slots + free - 1) + evaluations(split, slots + free)
        return split + parts + self.write + self.read < evaluations(length, slots)
