"""Kernels of torch's compiler for the blocks of an elementwise optimizer."""

from collections.abc import Callable
from functools import cache
from itertools import count
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metagrad._agreement import disagreement, reason_of, warn_uncompiled
from metagrad._block import Block, Rule, Values
from metagrad._tree import map_tensors, tensor_leaves

_numbers = count()

Kernel: TypeAlias = Callable[..., Any]
"""`apply` or `pull` of `_block`: (rule, now, block, …), where results are written over what is given."""


@cache
def compiled(function: Kernel) -> Kernel:
    """`function` compiled for each rule and each kind of numbers, at the first call proved; itself where that fails.

    Kernels are kept for the whole process: they hold no state, and are the same for every run.
    """
    kernels: dict[object, Kernel] = {}

    def run(rule: Rule, now: Values, block: Block, *others: Any) -> Any:
        asked = [each for each in others if not tensor_leaves(each)]
        # By the rule: an optimizer that is a function of `meta` makes an equal one at every step.
        kind = rule, block.gradient.dtype, block.gradient.device, len(block.memory), *asked
        if kind not in kernels:
            fast = torch.compile(_copied(function, rule), fullgraph=True, dynamic=True)
            plain = _bound(function, rule)
            kernels[kind] = fast if _agrees(fast, plain, (now, block, *others)) else plain
        return kernels[kind](now, block, *others)

    return run


def tensors(values: Values, device: torch.device) -> Values:
    """Tensors, which may be others at every step without another kernel."""
    return {name: torch.as_tensor(x, dtype=torch.float64).to(device).detach() for name, x in values.items()}


def _bound(function: Kernel, rule: Rule) -> Kernel:
    def call(*given: Any) -> Any:
        return function(rule, *given)

    return call


def _copied(function: Kernel, rule: Rule) -> Kernel:
    """`function` in code of its own: torch keeps eight kernels for one piece of code, whoever they were made for."""
    call: Any = _bound(function, rule)
    code = call.__code__.replace(co_name=f"kernel_{next(_numbers)}")  # By its name unequal to the others.
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)


def _agrees(fast: Kernel, plain: Kernel, given: tuple[Any, ...]) -> bool:
    try:
        gap = disagreement(_after(fast, given), _after(plain, given))
    except Exception as error:  # Whatever compilers raise.
        gap = reason_of(error)
    if gap is not None:
        warn_uncompiled(gap)
    return gap is None


def _after(kernel: Kernel, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of what a kernel is given, as it leaves them, and what it returns."""
    own = map_tensors(Tensor.clone, given)
    return own, kernel(*own)
