"""What is differentiated: one or several metrics of the trained state, or of states on the way to it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metagrad._buffers import DifferentiableStatistics
from metagrad._refusals import refuse_changes_in_place
from metagrad._tree import describe, differentiable, floating_leaves, fresh, not_finite, with_floating_leaves
from metagrad._types import Metric, NonFiniteError, Scalar, State, Term

Read: TypeAlias = Callable[[State], State]


@dataclass(frozen=True)
class Trajectory:
    """Φ = Σ_t metrics[t](state_t): a metric of several states of one run, where state_t is the state before step t.

    Args:
        metrics: from step to metric; step T, the number of steps, is the trained state.

    Example:
        >>> import metagrad as mg
        >>> loss = lambda state: state.params["w"] ** 2
        >>> metric = mg.Trajectory({t: loss for t in range(1, 11)})  # the sum over ten steps
    """

    metrics: Mapping[int, Metric]


@dataclass(frozen=True)
class Objective:
    """K metrics, each a sum of terms at certain steps.

    Attributes:
        terms: for each metric, from step to the function of that step's state.
        is_list: whether the user gave a list, and expects a leading axis.
        read: from a state to the one that metrics see.
    """

    terms: list[dict[int, Metric]]
    is_list: bool
    read: Read

    @staticmethod
    def of(metric: Any, num_steps: int, read: Read = lambda state: state) -> "Objective":
        """The objective that a user means by a metric, a `Trajectory`, or a list of them.

        Raises:
            ValueError: if it is none of these, or a step lies outside the run.
        """
        is_list = isinstance(metric, Sequence)
        metrics = list(metric) if is_list else [metric]
        if not metrics:
            raise ValueError("`metric` is an empty list. Pass at least one function of the trained state.")
        terms = [dict(m.metrics) if isinstance(m, Trajectory) else {num_steps: m} for m in metrics]
        for steps in terms:
            if not steps or not all(isinstance(t, int) and 0 <= t <= num_steps for t in steps):
                raise ValueError(
                    f"a `Trajectory` has metrics at steps {sorted(steps)}, but the run has states 0 to {num_steps}. "
                    f"Name at least one of these; {num_steps} is the trained state."
                )
            if wrong := [m for m in steps.values() if not callable(m)]:
                raise ValueError(
                    f"`metric` is {describe(wrong[0])}. Pass a function of the trained state, a list of them, or a "
                    "`Trajectory`."
                )
        return Objective(terms, is_list, read)

    def try_on(self, state: State) -> list[Term]:
        """Each metric at the initial state, so that what cannot be differentiated is reported before training.

        Returns:
            The sum of each metric's values, with ones for a gradient: to take it costs as much as a step.

        Raises:
            ValueError: as `checked_value` does.
        """
        values = {id(m): checked_value(m, state, self.read)[0].detach() for steps in self.terms for m in steps.values()}
        ones = [torch.ones_like(leaf) for leaf in floating_leaves(differentiable(state))]
        return [Term(reduce(torch.add, (values[id(m)] for m in steps.values())), ones) for steps in self.terms]

    def marks(self, initial: State) -> dict[str, Any]:
        """What tells these metrics from others: their steps, and what they give on the initial state and beside it."""
        parts = differentiable(initial)
        # Beside it too: many metrics are alike where parameters are still zero.
        moved = with_floating_leaves(parts, [leaf + 0.01 * (1 + leaf.abs()) for leaf in floating_leaves(parts)])
        states = (initial, initial._replace(**moved._asdict()))
        found = [{id(m): _term(m, at, self.read) for steps in self.terms for m in steps.values()} for at in states]
        return {
            f"metric {k}": [(t, [terms[id(m)] for terms in found]) for t, m in sorted(steps.items())]
            for k, steps in enumerate(self.terms)
        }

    def at(self, state: State) -> list[Term | None]:
        """What each metric adds at this state, None where it has no term.

        Raises:
            NonFiniteError: if a metric or its gradient is NaN or infinite.
        """
        return [evaluate(steps[state.step], state, self.read) if state.step in steps else None for steps in self.terms]

    def stacked(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """K lists of tensors as one list, with the leading axis that a list of metrics asks for."""
        return [torch.stack(each) if self.is_list else each[0] for each in zip(*gradients, strict=True)]


def value_of(metric: Metric, state: State) -> Scalar:
    """Φ = metric(state) with its graph, through parameters, optimizer state and buffers alike."""
    # Cloned: a metric that runs a module in training mode changes its buffers in place.
    buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
    given = differentiable(state)._replace(buffers={})
    with torch.enable_grad(), DifferentiableStatistics() if buffers else nullcontext():
        with refuse_changes_in_place("the metric", state=given):
            return metric(state._replace(buffers=buffers))


def checked_value(metric: Metric, state: State, read: Read = lambda state: state) -> tuple[Scalar, list[Tensor]]:
    """Φ = metric(state) with its graph, and the leaves it was computed from, checked to be differentiable.

    Raises:
        ValueError: if Φ is not a floating-point scalar, or depends on nothing that training changes.
    """
    # Fresh leaves: Φ is differentiated with respect to this state, the replay does the rest.
    params, optimizer, buffers = variables = fresh(differentiable(state))
    phi = value_of(metric, read(State(params, buffers, optimizer, state.rng, state.step)))
    if not isinstance(phi, Tensor) or phi.ndim != 0 or not phi.is_floating_point():
        raise ValueError(f"the metric returned {describe(phi)}. Return a floating-point scalar, shape ().")
    if not phi.requires_grad:
        raise ValueError(
            "the metric does not depend on the parameters. Compute it from `state.params`, for instance by "
            "torch.func.functional_call(model, state.params, ...)."
        )
    return phi, floating_leaves(variables)


def evaluate(metric: Metric, state: State, read: Read) -> Term:
    """Φ = metric(state) and dΦ/ds.

    Raises:
        ValueError: as `checked_value` does.
        NonFiniteError: if Φ or its gradient is NaN or infinite.
    """
    term = _term(metric, state, read)
    wrong = not_finite("state", differentiable(state), term.cotangent)
    if wrong or not bool(torch.isfinite(term.value)):
        raise NonFiniteError(
            f"the metric is {float(term.value)} after {state.step} steps"
            + (f", and its gradient is not finite in {', '.join(wrong)}." if wrong else ".")
        )
    return term


def _term(metric: Metric, state: State, read: Read) -> Term:
    phi, leaves = checked_value(metric, state, read)
    gradient = torch.autograd.grad(phi, leaves, allow_unused=True)
    # Most metrics do not read the optimizer's state: zeros for it that take no memory.
    filled = [x.new_zeros(()).expand_as(x) if g is None else g for g, x in zip(gradient, leaves, strict=True)]
    return Term(phi.detach(), filled)
