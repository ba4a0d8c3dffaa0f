"""Schedules with more structure than one row of slots: the tree of REPLAY, and states in RAM and on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from metagrad._plan import Action, Drop, Load, Reverse, Run, Save
from metagrad._schedule import Schedule, best_split, binomial, evaluations, refuse_count, thinned


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
        here, starts, free = start, [start], self.disk_slots - kept
        while (split := self._split(stop - here, free)) is not None:
            following = here + split
            yield Run(here, following)
            yield Save(following, on_disk=True)
            here = following
            starts.append(here)
            free -= 1
        yield from binomial(here, stop, self.ram_slots + 1)
        for number, (here, following) in reversed(list(enumerate(pairwise(starts)))):
            yield Drop(following)
            yield Load(here)
            yield from self.reversal(here, following, kept + number)

    def thinned(self, kept: Sequence[int], stop: int) -> list[int]:
        def cost(length: int, number: int) -> float:
            free = max(self.disk_slots - number - 1, 0)
            return cheapest(length, free, self.ram_slots + 1, self.write, self.read)[0]

        return thinned(kept, stop, self.disk_slots, cost)

    def _split(self, length: int, free: int) -> int | None:
        """Where to keep the next of the `free` states on disk for `length` steps; None where RAM alone is cheaper."""
        return cheapest(length, free, self.ram_slots + 1, self.write, self.read)[1]


@lru_cache(maxsize=1 << 18)
def cheapest(length: int, free: int, slots: int, write: float, read: float) -> tuple[float, int | None]:
    """The time to reverse `length` steps from a state on disk, and the distance to the next one there, None for none.

    In units of one step's time; the initial state of the `slots` is the one on disk.
    """
    alone = evaluations(length, slots) + read * _loads(length, slots)
    if free < 1 or length <= slots + 1:
        return alone, None
    split = best_split(length, slots + free)
    if length - split == 1:
        return alone, None
    right = cheapest(length - split, free - 1, slots, write, read)[0]
    left = cheapest(split, free, slots, write, read)[0]
    with_disk = split + write + right + read + left
    return (with_disk, split) if with_disk < alone else (alone, None)


def _loads(length: int, slots: int) -> int:
    """How often `binomial` takes its first state in hand again."""
    if length <= slots:
        return min(length - 1, 1)
    if slots == 1:
        return length - 1
    loads = 0
    while length > 1:
        length = best_split(length, slots)
        loads += 1
    return loads
