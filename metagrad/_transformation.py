"""What our optimizers are made of: transformations with a pullback, and hyperparameters that change by step."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple, Protocol, TypeAlias

import optree
import torch
import torchopt
from jaxtyping import Float, Int
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._reverse import pull_gradient
from metagrad._tree import add, describe, floating_leaves, fresh, grouped, joined, separate, with_floating_leaves
from metagrad._types import Tree

Value: TypeAlias = float | Tensor
"""A hyperparameter at one step."""

Hyperparameter: TypeAlias = Value | Callable[[int], Value]
"""A number, a tensor of shape (), or a schedule: a function of the number of steps taken so far."""


class Given(NamedTuple):
    """What is given to an update, or the cotangents of that; None where nobody asked for them."""

    gradient: Tree
    state: Tree
    params: Tree


class Made(NamedTuple):
    """The updated parameters and the new state of the optimizer, or the cotangents of that."""

    params: Tree
    state: Tree


Apply: TypeAlias = Callable[[Tree, Tree, Tree], Made]
"""From gradient, state and parameters to what is made of them."""


class PullApply(Protocol):
    """From the cotangents of what `apply` makes to those of what it was given, and of `meta`.

    Those given share no memory, and are used up. `meta` are leaves that the hyperparameters may have been computed
    from; gradients are enabled inside. Those of the state and the parameters are None unless `wrt_state`.
    """

    def __call__(
        self, given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool, /
    ) -> tuple[Given, list[Tensor]]: ...


class Divided(NamedTuple):
    """Parameters of which this process has rows.

    Attributes:
        whole: what each is in all, by name: tensors of torch's meta device.
        gathered: from a number of this process to those of all, stacked; differentiable.
    """

    whole: Mapping[str, Tensor]
    gathered: Callable[[Float[Tensor, ""]], Float[Tensor, " ranks"]]


class Transformation(GradientTransformation):
    """A gradient transformation that is known to be pure and differentiable: written here, or adapted.

    Attributes:
        apply: its update, added to the parameters.
        pull: the pullback of `apply`; by autograd, where none is given.
        compiled: the same transformation on compiled kernels; itself, where there are none.
        on_rows: from `Divided` to the same transformation of rows, with rows for a state. The cotangent of `meta` is
            then this process's part of a sum. None where an entry's update may depend on any other's.
    """

    apply: Apply
    pull: PullApply
    compiled: Callable[[], "Transformation"]
    on_rows: Callable[[Divided], "Transformation"] | None

    def __new__(  # type: ignore[no-untyped-def]  # a named tuple's
        cls,
        init: Callable[..., Tree],
        update: Callable[..., Tree],
        apply: Apply | None = None,
        pull: PullApply | None = None,
        compiled: Callable[[], "Transformation"] | None = None,
        on_rows: Callable[[Divided], "Transformation"] | None = None,
    ):
        """Of TorchOpt's two functions; of the others where they are faster than what is made of these."""
        self = super().__new__(cls, init, update)
        self.apply = apply or applied_by(update)
        self.pull = pull or pulled_by_autograd(self.apply)
        self.compiled = compiled or (lambda: self)
        self.on_rows = on_rows
        return self


def chained(*links: Transformation) -> Transformation:
    """One transformation after the other, as `torchopt.chain`, whose state it has; the last one is pulled by itself."""
    *earlier, last = links

    def init(params: Tree) -> tuple[Tree, ...]:
        return tuple(link.init(params) for link in links)

    def reach(gradient: Tree, state: Tree, params: Tree) -> Made:
        """What the last one is given for a gradient, and the new states of the others."""
        new = []
        for link, own in zip(earlier, state, strict=False):
            gradient, changed = link.update(gradient, own, params=params, inplace=False)
            new.append(changed)
        return Made(gradient, tuple(new))

    def update(updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Tree]:
        reached, new = reach(updates, state, params)
        updates, changed = last.update(reached, state[-1], params=params, inplace=False)
        return updates, (*new, changed)

    def apply(gradient: Tree, state: Tree, params: Tree) -> Made:
        reached, new = reach(gradient, state, params)
        made = last.apply(reached, state[-1], params)
        return Made(made.params, (*new, made.state))

    def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
        *ends, end = cotangent.state
        with torch.no_grad():
            reached, _ = reach(*given)
        back, to_meta = last.pull(
            given._replace(gradient=reached, state=given.state[-1]), cotangent._replace(state=end), meta, wrt_state
        )
        first, more = pulled_by_autograd(reach)(
            given._replace(state=given.state[:-1]), Made(back.gradient, tuple(ends)), meta, wrt_state
        )
        if not wrt_state:
            return Given(first.gradient, None, None), add(to_meta, more)
        params = with_floating_leaves(back.params, add(floating_leaves(back.params), floating_leaves(first.params)))
        return Given(first.gradient, (*first.state, back.state), params), add(to_meta, more)

    return Transformation(
        init,
        update,
        apply,
        pull,
        lambda: chained(*(link.compiled() for link in links)),
        together([link.on_rows for link in links], lambda parts: chained(*parts)),
    )


def together(
    each: Sequence[Callable[[Divided], Transformation] | None],
    join: Callable[[Sequence[Transformation]], Transformation],
) -> Callable[[Divided], Transformation] | None:
    """The `on_rows` of what is made of several transformations, if each has one."""
    known = [on_rows for on_rows in each if on_rows is not None]
    return (lambda divided: join([on_rows(divided) for on_rows in known])) if len(known) == len(each) else None


def applied_by(update: Callable[..., Tree]) -> Apply:
    """`update`, and its result added to the parameters."""

    def apply(gradient: Tree, state: Tree, params: Tree) -> Made:
        updates, new = update(gradient, state, params=params, inplace=False)
        return Made(torchopt.apply_updates(params, updates, inplace=False), new)

    return apply


def pulled_by_autograd(apply: Apply) -> PullApply:
    """The pullback of a differentiable function."""

    def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
        given = fresh(given)
        made = apply(*given)
        groups = [floating_leaves(given if wrt_state else given.gradient), meta]
        ends = [floating_leaves(cotangent)]
        # Retained: what the hyperparameters were computed from serves several groups, and several metrics.
        pulled = pull_gradient(floating_leaves(made), joined(groups), ends, retain_graph=True)[0]
        to_given, to_meta = grouped(pulled, groups)
        if wrt_state:
            # autograd may return one tensor for two inputs, and each will be written over.
            return with_floating_leaves(given, separate(to_given)), to_meta
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
