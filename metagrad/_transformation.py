"""What our optimizers are made of: transformations that may be trusted, and hyperparameters that change by step."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import NamedTuple, TypeAlias

import optree
import torch
from jaxtyping import Int
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._tree import describe
from metagrad._types import Tree

Value: TypeAlias = float | Tensor
"""A hyperparameter at one step."""

Hyperparameter: TypeAlias = Value | Callable[[int], Value]
"""A number, a tensor of shape (), or a schedule: a function of the number of steps taken so far."""


class Transformation(GradientTransformation):
    """A gradient transformation that is known to be pure and differentiable: written here, or adapted."""


class Steps(NamedTuple):
    """The state of a transformation that remembers nothing but the number of steps taken so far."""

    step: Int[Tensor, ""]


def values_by_step(
    given: Mapping[str, Hyperparameter], check: Callable[[str, Value], None] = lambda name, value: None
) -> Callable[[Int[Tensor, ""]], dict[str, Value]]:
    """A function from the number of steps taken to the hyperparameters of the next one.

    What is constant is checked now, and what a schedule returns when it does.

    Raises:
        ValueError: for what is neither a number nor a tensor of shape (), and whatever `check` refuses.
    """

    def checked(name: str, value: object) -> Value:
        if isinstance(value, Tensor) and value.ndim == 0:
            number: Value = value
        elif isinstance(value, Real):
            number = float(value)  # a schedule of NumPy returns NumPy's numbers
        else:
            raise ValueError(
                f"`{name}` is {describe(value)}. Pass a number, a tensor of shape () or a function of the step: for "
                "one value per step `lambda step: values[step]`; for one per parameter see mg.optim.groups."
            )
        check(name, number)
        return number

    constants = {name: checked(name, value) for name, value in given.items() if not callable(value)}
    schedules = {name: value for name, value in given.items() if callable(value)}

    def at(step: Int[Tensor, ""]) -> dict[str, Value]:
        # A Python integer: given a tensor, TorchOpt's schedules compute in torch's default precision, mostly float32.
        count = int(step)
        return {**constants, **{name: checked(name, schedule(count)) for name, schedule in schedules.items()}}

    return at


def is_zero(value: Hyperparameter) -> bool:
    """Whether `value` is the number 0, which no gradient can change: the term that it multiplies is left out."""
    return isinstance(value, Real) and float(value) == 0.0


def plus_decay(updates: Tree, params: Tree, weight_decay: Value) -> Tree:
    """u + weight_decay·θ."""
    if is_zero(weight_decay):
        return updates
    return optree.tree_map(lambda u, p: u + weight_decay * p, updates, params)


def zero_steps() -> Int[Tensor, ""]:
    """The count of a new optimizer."""
    # On the CPU whatever the device of the parameters: the count is read at every step.
    return torch.zeros((), dtype=torch.int64)
