"""The lines of a plan: what takes memory, by which arithmetic, and when. Integers only."""

from math import ceil, prod
from typing import NamedTuple

FLOAT = 4
"""Bytes of a number: `dpg` keeps weights in float32."""


class Line(NamedTuple):
    """Something that takes memory on one device.

    Attributes:
        what: for a person.
        arithmetic: how `bytes` came about.
    """

    what: str
    arithmetic: str
    bytes: int


class Phase(NamedTuple):
    """Everything that is there at one moment of a run, besides what is there all the time."""

    name: str
    lines: list[Line]

    @property
    def bytes(self) -> int:
        """The sum of its lines."""
        return sum(line.bytes for line in self.lines)


class Memory(NamedTuple):
    """Bytes on one device, phase by phase: phases follow one another, so the most at a time is that of one of them."""

    always: Phase
    phases: list[Phase]

    @property
    def largest(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """The most bytes at a time."""
        return self.always.bytes + self.largest.bytes


def product(what: str, *factors: int, unit: int = FLOAT, over: int = 1) -> Line:
    """A line of so many numbers of `unit` bytes, divided between `over` devices; factors of 1 are left out."""
    told = [f"{factor:,}" for factor in factors if factor != 1] or ["1"]
    told = [*told, f"{unit} B"] + ([f"1/{over}"] if over > 1 else [])
    return Line(what, " x ".join(told), ceil(prod(factors) * unit / over))


def counted(what: str, how: str, num_bytes: int) -> Line:
    """A line whose bytes were counted operation by operation."""
    return Line(what, f"counted: {how}", num_bytes)


def readable(num_bytes: float) -> str:
    """Bytes for a person, in powers of 1024; also fewer than none."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size / 10:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:.0f} B"


def kind(action: object) -> str:
    """What a schedule's plan calls an action: Save, Load, Run, Reverse or Drop."""
    return type(action).__name__
