"""The words of the library: what a user passes in, what comes back, and what can go wrong."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from jaxtyping import Float
from torch import Tensor

Tree: TypeAlias = Any
"""Nested dicts, lists, tuples and named tuples with tensors at the leaves."""

Params: TypeAlias = dict[str, Tensor]
Scalar: TypeAlias = Float[Tensor, ""]


class State(NamedTuple):
    """Everything a training step reads and writes, as a value: `state_t` is the state before step t."""

    params: Params
    buffers: dict[str, Tensor]
    optimizer: Tree
    rng: tuple[Tensor, ...]
    step: int


class Loss(Protocol):
    """`loss(params, batch, meta)`: one loss per example, or one scalar for the whole batch.

    `params` holds the parameters and the buffers by name, ready for `torch.func.functional_call`.
    """

    def __call__(self, params: Params, batch: Tree, meta: Tree, /) -> Float[Tensor, " examples"] | Scalar: ...


class ExampleLoss(Protocol):
    """`loss(params, batch)`: one loss per example, before any weight."""

    def __call__(self, params: Params, batch: Tree, /) -> Float[Tensor, " examples"]: ...


class Metric(Protocol):
    """`metric(state)`: the differentiable scalar Φ of the trained state."""

    def __call__(self, state: State, /) -> Scalar: ...


class Batches(Protocol):
    """The training data in order: `batches[t]` is the batch of step t, the same at every reading."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int, /) -> Tree: ...


class Pullback(NamedTuple):
    """Cotangents of a step's inputs, each in the order of `floating_leaves`; `state` is None unless asked for."""

    state: list[Tensor] | None
    meta: list[Tensor]


Pull: TypeAlias = Callable[[Sequence[Tensor]], Pullback]
"""From the cotangent of the state after a step to those of the step's inputs."""


class Step(Protocol):
    """One pure training step: equal arguments give equal bits, nothing is changed in place."""

    def init(self, params: Any, meta: Tree) -> State:
        """The state before step 0."""
        ...

    def validate(self, batches: Batches, meta: Tree) -> None:
        """Raise a ValueError for inputs that cannot work, before anything is trained."""
        ...

    def __call__(self, state: State, batch: Tree, meta: Tree) -> State:
        """The next state; with its graph where gradients are enabled."""
        ...

    def vjp(self, state: State, batch: Tree, meta: Tree, *, wrt_state: bool) -> tuple[State, Pull]:
        """The next state, and the map from its cotangent to those of `state` (if `wrt_state`) and `meta`."""
        ...


class Stats(NamedTuple):
    """What a metagradient cost: step evaluations, wall time and the largest total of kept states."""

    forward: int
    replayed: int
    reversed: int
    seconds: float
    ram_bytes: int
    disk_bytes: int


class Result(NamedTuple):
    """Φ, its gradients and the trained state.

    Attributes:
        value: Φ.
        meta: dΦ/dz, the tree of `meta`; None at leaves that are not floating point.
        params: dΦ/dθ_0 under the names of `params`, or None unless asked for.
        state: the state after the last step, detached.
        stats: what it cost; None where nothing was counted.
    """

    value: Scalar
    meta: Tree
    params: Mapping[str, Tensor] | None
    state: State
    stats: Stats | None


class NonFiniteError(ArithmeticError):
    """A loss, a metric or a cotangent is NaN or infinite; the message names the step and the tensor."""


class ReplayMismatchError(RuntimeError):
    """The same step on the same inputs gave other bits; the message names the step and the tensor."""
