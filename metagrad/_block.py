"""One block of entries of an elementwise optimizer: θ ← θ − lr·(d + decay·θ), and the pullback of that.

What makes d of the gradient is a rule. Only here is the learning rate, and the decay, which is added to d, or to the
gradient before the rule sees it. x̄ is the cotangent of x, also in the formulas of the rules.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from metagrad._fused import dot, plus
from metagrad._transformation import Value

Entries = Float[Tensor, " entries"]
Values: TypeAlias = dict[str, Value]
Shares: TypeAlias = dict[str, Tensor]
"""What a block adds to the cotangents of values, where those are wanted; nothing where it is known to add 0."""

Out: TypeAlias = Sequence[Entries | None]
"""Where results are to be written; None for a new tensor, which may have a graph."""


class Block(NamedTuple):
    """The same entries of the gradient, of the parameters, and of every tensor that the optimizer remembers."""

    gradient: Entries
    params: Entries
    memory: list[Entries]


class After(NamedTuple):
    """The same entries of what an update makes, or the cotangents of that."""

    params: Entries
    memory: list[Entries]


class Wanted(NamedTuple):
    """Which cotangents are asked for beside the gradient's: those of parameters and memory, and of hyperparameters."""

    state: bool
    values: bool


class Rule(Hashable, Protocol):
    """How a direction is made of the gradient, entry by entry.

    Attributes:
        decays: whether there is a decay.
        decoupled: whether it is added to the direction rather than to the gradient.
    """

    @property
    def decays(self) -> bool: ...

    @property
    def decoupled(self) -> bool: ...

    def at(self, now: Values, count: int, /) -> Values:
        """The hyperparameters of a step after `count` others, and what else of it is the same for all entries."""
        ...

    def direction(self, now: Values, gradient: Entries, memory: list[Entries], out: Out, /) -> list[Entries]:
        """The direction, and the new memory, that in `out`."""
        ...

    def pull(self, now: Values, block: Block, ends: list[Entries], out: Entries, wanted: Wanted, /) -> Shares:
        """Write ḡ to `out`, from the cotangents of what `direction` returns; that of the direction is used up.

        The cotangents of the memory are written over those of the new memory.
        """
        ...


def update(rule: Rule, now: Values, block: Block) -> list[Entries]:
    """What is added to the parameters, and the new memory; differentiable by autograd."""
    gradient = _decayed(rule, now, block)
    direction, *memory = rule.direction(now, gradient, block.memory, [None] * len(block.memory))
    if rule.decays and rule.decoupled:
        direction = direction + now["weight_decay"] * block.params
    return [-now["lr"] * direction, *memory]


def apply(rule: Rule, now: Values, block: Block, out: After) -> None:
    """Write the new parameters and the new memory to `out`."""
    direction, *_ = rule.direction(now, _decayed(rule, now, block), block.memory, out.memory)
    kept = block.params
    if rule.decays and rule.decoupled:
        kept = torch.mul(kept, 1 - now["lr"] * now["weight_decay"], out=out.params)
    plus(kept, -now["lr"], direction, out=out.params)


def pull(rule: Rule, now: Values, block: Block, end: After, to_gradient: Entries, wanted: Wanted) -> Shares:
    """Write ḡ to `to_gradient`, and, where wanted, the cotangents of parameters and memory over those in `end`."""
    block = block._replace(gradient=_decayed(rule, now, block))
    # Copied where nobody gave leave to write over them.
    to_memory = end.memory if wanted.state else [entries.clone() for entries in end.memory]
    shares = rule.pull(now, block, [-now["lr"] * end.params, *to_memory], to_gradient, wanted)
    if wanted.values:
        direction = rule.direction(now, block.gradient, block.memory, [None] * len(block.memory))[0]
        shares["lr"] = -dot(end.params, direction)
        if rule.decays and rule.decoupled:
            along = dot(end.params, block.params)
            shares["lr"] -= now["weight_decay"] * along
            shares["weight_decay"] = -now["lr"] * along
        elif rule.decays:
            shares["weight_decay"] = dot(to_gradient, block.params)
    if wanted.state and rule.decays:
        if rule.decoupled:
            end.params.mul_(1 - now["lr"] * now["weight_decay"])
        else:
            plus(end.params, now["weight_decay"], to_gradient, out=end.params)
    return shares


def _decayed(rule: Rule, now: Values, block: Block) -> Entries:
    if rule.decays and not rule.decoupled:
        return plus(block.gradient, now["weight_decay"], block.params)
    return block.gradient
