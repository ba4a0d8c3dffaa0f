"""An optimizer's formulas as one compiled kernel each for the update and its pullback."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from metagrad._agreement import disagreement, reason_of, warn_uncompiled
from metagrad._block import Block, Entries, Pulled, Rule, Values, Wanted


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
        change, memory = _kernel(self.rule.update)(_tensors(values, block), block)
        return change, memory

    def pull(self, values: Values, block: Block, update: Entries, memory: list[Entries], wanted: Wanted) -> Pulled:
        """That of the rule, to rounding."""
        made: Pulled = _kernel(self.rule.pull)(_tensors(values, block), block, update, memory, wanted)
        return made


def _tensors(values: Values, block: Block) -> Values:
    """Tensors, which may be others at every step without another kernel."""
    device = block.gradient.device
    return {name: torch.as_tensor(value, dtype=torch.float64).to(device).detach() for name, value in values.items()}


@cache
def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, at its first call on a type of numbers proved; itself where that fails."""
    fast: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=True)
    trusted: dict[object, bool] = {}

    def run(values: Values, block: Block, *others: Any) -> Any:
        kind = block.gradient.dtype, block.gradient.device, len(block.memory), repr([bool(x) for x in others[1:]])
        if kind not in trusted:
            trusted[kind] = _agrees(fast, function, values, block, *others)
        return (fast if trusted[kind] else function)(values, block, *others)

    return run


def _agrees(fast: Callable[..., Any], plain: Callable[..., Any], *given: Any) -> bool:
    try:
        gap = disagreement(fast(*given), plain(*given))
    except Exception as error:  # Whatever compilers raise.
        gap = reason_of(error)
    if gap is not None:
        warn_uncompiled(gap)
    return gap is None
