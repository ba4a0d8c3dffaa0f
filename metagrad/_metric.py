"""Φ and its cotangent at one state, with everything a metric can get wrong reported in the user's words."""

from typing import NamedTuple

import torch
from torch import Tensor

from metagrad._tree import (
    describe,
    differentiable,
    floating_leaves,
    fresh,
    not_finite,
)
from metagrad._types import Metric, NonFiniteError, Params, Scalar, State


class Value(NamedTuple):
    """Φ with its graph, and the tensors it was computed from: those that carry a cotangent, and changed buffers."""

    phi: Scalar
    leaves: list[Tensor]
    changed_buffers: Params


def checked_value(metric: Metric, state: State, initial: State) -> Value:
    """Φ = metric(state), checked to be something that can be differentiated.

    Raises:
        ValueError: if Φ is not a floating-point scalar, does not depend on the parameters, or reads normalisation
            statistics that differ from `initial`.
    """
    # Fresh leaves: Φ is differentiated with respect to this state, the replay does the rest.
    params, optimizer = variables = fresh(differentiable(state))
    buffers = {
        # Cloned: a metric that runs a module in training mode updates its buffers in place.
        name: buffer.clone().requires_grad_(
            buffer.is_floating_point() and not torch.equal(buffer, initial.buffers[name])
        )
        for name, buffer in state.buffers.items()
    }
    try:
        with torch.enable_grad():
            phi = metric(State(params, buffers, optimizer, state.rng, state.step))
    except RuntimeError as error:
        # torch refuses to differentiate these two at all, in several wordings.
        if "running_mean" in str(error) or "running_var" in str(error):
            raise ValueError(_buffer_message("the running statistics of a normalisation layer")) from error
        raise
    if not isinstance(phi, Tensor) or phi.ndim != 0 or not phi.is_floating_point():
        raise ValueError(f"the metric returned {describe(phi)}. Return a floating-point scalar, shape ().")
    if not phi.requires_grad:
        raise ValueError(
            "the metric does not depend on the parameters. Compute it from `state.params`, for instance by "
            "torch.func.functional_call(model, state.params, ...)."
        )
    return Value(
        phi, floating_leaves(variables), {name: buffer for name, buffer in buffers.items() if buffer.requires_grad}
    )


def evaluate(metric: Metric, state: State, initial: State) -> tuple[Scalar, list[Tensor]]:
    """Φ = metric(state), and dΦ/ds in the order of `floating_leaves(differentiable(state))`.

    Buffers are constants to the derivative. One that differs from `initial` depends on training, so a metric that
    reads it differentiably is refused rather than answered with a part of the gradient.

    Raises:
        ValueError: as `checked_value` does, and if the metric reads such a buffer.
        NonFiniteError: if Φ or its gradient is NaN or infinite.
    """
    phi, leaves, changed = checked_value(metric, state, initial)
    sources = [*leaves, *changed.values()]
    gradient = torch.autograd.grad(phi, sources, allow_unused=True)
    read = [name for name, g in zip(changed, gradient[len(leaves) :], strict=True) if g is not None]
    if read:
        raise ValueError(_buffer_message(f"the buffers {', '.join(read)}"))
    pairs = zip(leaves, gradient, strict=False)
    cotangent = [torch.zeros_like(leaf) if g is None else g for leaf, g in pairs]
    wrong = not_finite("state", differentiable(state), cotangent)
    if wrong or not bool(torch.isfinite(phi.detach())):
        raise NonFiniteError(
            f"the metric is {float(phi.detach())} after {state.step} steps"
            + (f", and its gradient is not finite in {', '.join(wrong)}." if wrong else ".")
        )
    return phi.detach(), cotangent


def by_name(params: dict[str, Tensor], gradient: list[Tensor] | None) -> dict[str, Tensor] | None:
    """The part of a state's gradient that belongs to its parameters, under their names."""
    return None if gradient is None else dict(zip(params, gradient[: len(params)], strict=True))


def _buffer_message(what: str) -> str:
    return (
        f"the metric reads {what}, which training changes, and buffers are not differentiated: the gradient would be "
        "incomplete. Detach them to take them as constants: {name: b.detach() for name, b in state.buffers.items()}."
    )
