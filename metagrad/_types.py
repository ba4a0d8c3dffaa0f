"""The words of the library: what a user passes in, what comes back, and what can go wrong."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Tree: TypeAlias = Any
"""Nested dicts, lists, tuples and named tuples with tensors at the leaves."""

Params: TypeAlias = dict[str, Tensor]
Scalar: TypeAlias = Float[Tensor, ""]


class State(NamedTuple):
    """Everything a training step reads and writes, as a value: `state_t` is the state before step t.

    Attributes:
        params: the trained tensors by name.
        buffers: other tensors of the model by name, such as running statistics.
        optimizer: a tree of whatever else is carried from step to step.
        rng: states of torch's random generators, the CPU's first; empty: the library fills them in.
        step: how many steps were taken.
    """

    params: Params
    buffers: dict[str, Tensor] = {}  # Never changed in place: states are values.
    optimizer: Tree = ()
    rng: tuple[Tensor, ...] = ()
    step: int = 0


class Loss(Protocol):
    """`loss(params, batch, meta)`: one loss per example, or one scalar for the whole batch.

    `params` holds the parameters and the buffers by name, ready for `torch.func.functional_call`.
    """

    def __call__(self, params: Params, batch: Tree, meta: Tree, /) -> Float[Tensor, " examples"] | Scalar: ...


class ExampleLoss(Protocol):
    """`loss(params, batch)`: one loss per example, or per token, before any weight."""

    def __call__(self, params: Params, batch: Tree, /) -> Float[Tensor, " examples *tokens"]: ...


class Metric(Protocol):
    """`metric(state)`: the differentiable scalar Φ of the trained state."""

    def __call__(self, state: State, /) -> Scalar: ...


class Batches(Protocol):
    """The training data in order: `batches[t]` is the batch of step t, the same at every reading."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int, /) -> Tree: ...


class Term(NamedTuple):
    """What a metric adds at a state: a value, and its cotangent in the order of `differentiable`'s floating leaves."""

    value: Scalar
    cotangent: list[Tensor]


class Pullback(NamedTuple):
    """Cotangents of a step's inputs, each in the order of `floating_leaves`; `state` is None unless asked for."""

    state: list[Tensor] | None
    meta: list[Tensor]


Pull: TypeAlias = Callable[[Sequence[Sequence[Tensor]]], list[Pullback]]
"""From cotangents of the state after a step, one for each metric, to those of the step's inputs. Used once.

The cotangents share no memory and are given away: they may be overwritten.
"""


class Step(Protocol):
    """What a user writes to train in a way of their own: `init`, and one pure step.

    Equal arguments give equal bits, nothing is changed in place, and every gradient taken inside is taken with
    `create_graph=True`. Gradients are always enabled inside. Random numbers and the fields `rng` and `step` are taken
    care of.
    """

    def init(self, params: Any, meta: Tree) -> State:
        """The state before step 0, for instance `State(params)`."""
        ...

    def __call__(self, state: State, batch: Tree, meta: Tree) -> State:
        """The state after one step on `batch`, for instance `state._replace(params=...)`."""
        ...


@runtime_checkable
class LinearStep(Step, Protocol):
    """A step that knows its own pullback: a `TrainStep`, or a user's `Step` under `AutogradStep`."""

    def validate(self, batches: Batches, meta: Tree) -> None:
        """Raise a ValueError for inputs that cannot work, before anything is trained."""
        ...

    def advance(self, state: State, batch: Tree, meta: Tree) -> tuple[State, Tree]:
        """The next state without a graph, and what is worth keeping with `state` for its pullback, or None."""
        ...

    def vjp(
        self, state: State, batch: Tree, meta: Tree, *, wrt_state: bool, kept: Tree = None
    ) -> tuple[Callable[[], State], Pull]:
        """The next state when called for, and the map from its cotangents to those of `state` (if asked) and `meta`."""
        ...

    def read(self, state: State) -> State:
        """`state` as a metric sees it, with a graph from its tensors where these are others."""
        ...

    def shown(self, part: State, num_metrics: int | None) -> State:
        """A state, or its gradient, as a result has it; with `num_metrics` every tensor leads with such an axis."""
        ...


class Stats(NamedTuple):
    """What a metagradient cost: step evaluations, wall time, and the most bytes of kept states at a time.

    `curvature` is how second derivatives were computed, where a `TrainStep` did it.
    """

    forward: int
    replayed: int
    reversed: int
    seconds: float
    ram_bytes: int
    disk_bytes: int
    curvature: str | None = None


class Result(NamedTuple):
    """Φ, its gradients and the trained state. For a list of K metrics `value` and every gradient lead with an axis K.

    Attributes:
        value: Φ.
        meta: dΦ/dz, the tree of `meta`; None at leaves that are not floating point.
        params: dΦ/dθ_0 under the names of `params`, or None unless asked for.
        state: the state after the last step, detached.
        stats: what it cost; None where nothing was counted.
        optimizer: the gradient of the initial optimizer state, with `params`.
        buffers: the gradient of the initial buffers by name, with `params`; None where they are not floating point.
    """

    value: Float[Tensor, ""] | Float[Tensor, " metrics"]
    meta: Tree
    params: Mapping[str, Tensor] | None
    state: State
    stats: Stats | None
    optimizer: Tree = None
    buffers: Mapping[str, Tensor | None] | None = None


class NonFiniteError(ArithmeticError):
    """A loss, a metric or a cotangent is NaN or infinite; the message names the step and the tensor."""


class ReplayMismatchError(RuntimeError):
    """The same step on the same inputs gave other bits; the message names the step and the tensor."""


class RankError(RuntimeError):
    """Another process of the run has ended, failed, or does not answer; the message names its rank."""


class ResumeError(RuntimeError):
    """A run's folder cannot be continued; the message names the file, and what in it does not fit."""
