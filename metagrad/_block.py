"""What an elementwise optimizer is made of: blocks of entries, and a rule for each entry."""

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


class Pulled(NamedTuple):
    """The cotangents of a block; None and nothing where they are 0; and the block's share of each hyperparameter's."""

    gradient: Entries
    params: Entries | None
    memory: list[Entries]
    values: dict[str, Tensor]


class Rule(Protocol):
    """An optimizer's formulas for one entry, as operations on blocks of them."""

    def at(self, now: Values, count: int, /) -> Values:
        """The hyperparameters of a step after `count` others, and what else of it is the same for all entries."""
        ...

    def update(self, values: Values, block: Block, /) -> tuple[Entries, list[Entries]]:
        """What to add to the parameters, and the new memory."""
        ...

    def pull(self, values: Values, block: Block, update: Entries, memory: list[Entries], wanted: bool, /) -> Pulled:
        """From the cotangents of what `update` returns; those of hyperparameters only where `wanted`."""
        ...
