"""What an elementwise optimizer is made of: blocks of entries, and a rule for each entry."""

from collections.abc import Hashable
from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from metagrad._transformation import Value

Entries = Float[Tensor, " entries"]
Values = dict[str, Value]


class Block(NamedTuple):
    """The same entries of the gradient, of the parameters, and of every tensor that the optimizer remembers."""

    gradient: Entries
    params: Entries
    memory: list[Entries]


class Wanted(NamedTuple):
    """Which cotangents are asked for beside the gradient's: those of parameters and memory, and of hyperparameters."""

    state: bool
    values: bool


class Pulled(NamedTuple):
    """The cotangents of a block and its share of the hyperparameters'; None and nothing where 0 or not asked for."""

    gradient: Entries
    params: Entries | None
    memory: list[Entries]
    values: dict[str, Tensor]


class Rule(Hashable, Protocol):
    """An optimizer's formulas for one entry, as operations on blocks of them."""

    def at(self, now: Values, count: int, /) -> Values:
        """The hyperparameters of a step after `count` others, and what else of it is the same for all entries."""
        ...

    def update(self, values: Values, block: Block, /) -> tuple[Entries, list[Entries]]:
        """What to add to the parameters, and the new memory."""
        ...

    def pull(self, values: Values, block: Block, update: Entries, memory: list[Entries], wanted: Wanted, /) -> Pulled:
        """From the cotangents of what `update` returns; those of the memory are left out where all are 0."""
        ...
