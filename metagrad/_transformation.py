"""What our optimizers are made of: transformations with a pullback, and hyperparameters that change by step."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple, Protocol, TypeAlias

import optree
import torch
from jaxtyping import Int
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._reverse import pull_gradient
from metagrad._tree import add, describe, floating_leaves, fresh, grouped, joined, with_floating_leaves
from metagrad._types import Tree

Value: TypeAlias = float | Tensor
"""A hyperparameter at one step."""

Hyperparameter: TypeAlias = Value | Callable[[int], Value]
"""A number, a tensor of shape (), or a schedule: a function of the number of steps taken so far."""


class Given(NamedTuple):
    """What an update reads, or the cotangents of that."""

    gradient: Tree
    state: Tree
    params: Tree  # As a cotangent None stands for zeros, or for what nobody asked for.


class Made(NamedTuple):
    """What an update returns, or the cotangents of that."""

    updates: Tree
    state: Tree


class PullUpdate(Protocol):
    """From the cotangents of an update's results to those of what it was given, and of `meta`.

    `meta` are leaves that the hyperparameters may have been computed from; gradients are enabled inside. Those of the
    state and the parameters are None unless `wrt_state`.
    """

    def __call__(
        self, given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool, /
    ) -> tuple[Given, list[Tensor]]: ...


class Transformation(GradientTransformation):
    """A gradient transformation that is known to be pure and differentiable: written here, or adapted.

    Attributes:
        pull: its pullback; by autograd, where none is given.
        compiled: the same transformation on compiled kernels; itself, where there are none.
    """

    pull: PullUpdate
    compiled: Callable[[], "Transformation"]

    def __new__(  # type: ignore[no-untyped-def]  # a named tuple's
        cls,
        init: Callable[..., Tree],
        update: Callable[..., Tree],
        pull: PullUpdate | None = None,
        compiled: Callable[[], "Transformation"] | None = None,
    ):
        """Of TorchOpt's two functions, the pullback of the second, and what makes both compiled."""
        self = super().__new__(cls, init, update)
        self.pull = pull or _pulled_by_autograd(update)
        self.compiled = compiled or (lambda: self)
        return self


def chained(*links: Transformation) -> Transformation:
    """One transformation after the other, as `torchopt.chain`, whose state it has, and each pulled back by itself."""

    def init(params: Tree) -> tuple[Tree, ...]:
        return tuple(link.init(params) for link in links)

    def update(updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = False) -> Made:
        new = []
        for link, own in zip(links, state, strict=True):
            updates, changed = link.update(updates, own, params=params, inplace=False)
            new.append(changed)
        return Made(updates, tuple(new))

    def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
        reached = [given.gradient]
        with torch.no_grad():
            for link, own in zip(links[:-1], given.state, strict=False):
                reached.append(link.update(reached[-1], own, params=given.params, inplace=False)[0])
        flowing, to_params, to_meta = cotangent.updates, None, [torch.zeros_like(leaf) for leaf in meta]
        states: list[Tree] = []
        for link, gradient, own, end in reversed(list(zip(links, reached, given.state, cotangent.state, strict=True))):
            back, more = link.pull(Given(gradient, own, given.params), Made(flowing, end), meta, wrt_state)
            flowing = back.gradient
            states.append(back.state)
            to_params = back.params if to_params is None else plus(to_params, back.params)
            to_meta = add(to_meta, more)
        return Given(flowing, tuple(reversed(states)) if wrt_state else None, to_params), to_meta

    return Transformation(init, update, pull, lambda: chained(*(link.compiled() for link in links)))


def plus(left: Tree, right: Tree | None) -> Tree:
    """The sum of two trees of cotangents."""
    if right is None:
        return left
    return with_floating_leaves(left, add(floating_leaves(left), floating_leaves(right)))


def _pulled_by_autograd(update: Callable[..., Tree]) -> PullUpdate:
    def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
        given = fresh(given)
        made = update(given.gradient, given.state, params=given.params, inplace=False)
        groups = [floating_leaves(given if wrt_state else given.gradient), meta]
        # Retained: what the hyperparameters were computed from serves several groups, and several metrics.
        pulled = pull_gradient(floating_leaves(made), joined(groups), [floating_leaves(cotangent)], retain_graph=True)[
            0
        ]
        to_given, to_meta = grouped(pulled, groups)
        if wrt_state:
            return with_floating_leaves(given, to_given), to_meta
        return Given(with_floating_leaves(given.gradient, to_given), None, None), to_meta

    return pull


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
    return torch.zeros((), dtype=torch.int64, device="cpu")
