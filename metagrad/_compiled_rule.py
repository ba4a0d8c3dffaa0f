"""An optimizer's formulas as one compiled kernel each for the update and its pullback."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count
from types import FunctionType
from typing import Any

import torch

from metagrad._agreement import disagreement, reason_of, warn_uncompiled
from metagrad._block import Block, Entries, Pulled, Rule, Values, Wanted

_numbers = count()


@dataclass(frozen=True)
class CompiledRule:
    """`rule` on compiled kernels, which are made once for all blocks, steps and runs, and proved against it."""

    rule: Rule

    def at(self, now: Values, count: int) -> Values:
        """Those of the rule."""
        return self.rule.at(now, count)

    def update(self, values: Values, block: Block) -> tuple[Entries, list[Entries]]:
        """That of the rule, to rounding."""
        if torch.is_grad_enabled():
            return self.rule.update(values, block)
        change, memory = _kernel(self.rule, "update")(_tensors(values, block), block)
        return change, memory

    def pull(self, values: Values, block: Block, update: Entries, memory: list[Entries], wanted: Wanted) -> Pulled:
        """That of the rule, to rounding."""
        made: Pulled = _kernel(self.rule, "pull")(_tensors(values, block), block, update, memory, wanted)
        return made


def _tensors(values: Values, block: Block) -> Values:
    """Tensors, which may be others at every step without another kernel."""
    device = block.gradient.device
    return {name: torch.as_tensor(value, dtype=torch.float64).to(device).detach() for name, value in values.items()}


@cache
def _kernel(rule: Rule, name: str) -> Callable[..., Any]:
    """A formula compiled for each kind of numbers, at the first call proved; itself where that fails.

    By the rule, not by its bound method: an optimizer that is a function of `meta` makes an equal rule at every step.
    """
    function: Callable[..., Any] = getattr(rule, name)
    kernels: dict[object, Callable[..., Any]] = {}

    def run(values: Values, block: Block, *others: Any) -> Any:
        # Of the pullback also: whether the memory has cotangents, and what is wanted.
        asked = [bool(x) if isinstance(x, list) else x for x in others[1:]]
        kind = block.gradient.dtype, block.gradient.device, len(block.memory), *asked
        if kind not in kernels:
            fast = torch.compile(_copied(function), fullgraph=True, dynamic=True)
            kernels[kind] = fast if _agrees(fast, function, values, block, *others) else function
        return kernels[kind](values, block, *others)

    return run


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in code of its own: torch keeps eight kernels for one piece of code, whoever they were made for."""

    def call(*given: Any) -> Any:
        return function(*given)

    code = call.__code__.replace(co_name=f"kernel_{next(_numbers)}")  # By its name unequal to the others.
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)


def _agrees(fast: Callable[..., Any], plain: Callable[..., Any], *given: Any) -> bool:
    try:
        gap = disagreement(fast(*given), plain(*given))
    except Exception as error:  # Whatever compilers raise.
        gap = reason_of(error)
    if gap is not None:
        warn_uncompiled(gap)
    return gap is None
