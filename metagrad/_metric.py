"""Φ and its cotangent at one state, with everything a metric can get wrong reported in the user's words."""

import torch
from torch import Tensor

from metagrad._tree import (
    describe,
    differentiable,
    floating_leaves,
    not_finite,
    with_floating_leaves,
)
from metagrad._types import Metric, NonFiniteError, Scalar, State


def evaluate(metric: Metric, state: State, initial: State) -> tuple[Scalar, list[Tensor]]:
    """Φ = metric(state), and dΦ/ds in the order of `floating_leaves(differentiable(state))`.

    Buffers are constants to the derivative. One that differs from `initial` depends on training, so a metric that
    reads it differentiably is refused rather than answered with a part of the gradient.

    Raises:
        ValueError: if Φ is not a floating-point scalar, does not depend on the parameters, or reads such a buffer.
        NonFiniteError: if Φ or its gradient is NaN or infinite.
    """
    # Fresh leaves: Φ is differentiated with respect to this state, the replay does the rest.
    leaves = [leaf.detach().requires_grad_() for leaf in floating_leaves(differentiable(state))]
    params, optimizer = with_floating_leaves(differentiable(state), leaves)
    buffers = {
        # Cloned: a metric that runs a module in training mode updates its buffers in place.
        name: value.clone().requires_grad_(value.is_floating_point() and not torch.equal(value, initial.buffers[name]))
        for name, value in state.buffers.items()
    }
    try:
        with torch.enable_grad():
            value = metric(State(params, buffers, optimizer, state.rng, state.step))
    except (NotImplementedError, RuntimeError) as error:
        if "running_mean" in str(error) or "running_var" in str(error):
            raise ValueError(_buffer_message("the running statistics of a normalisation layer")) from error
        raise
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        raise ValueError(f"the metric returned {describe(value)}. Return a floating-point scalar, shape ().")
    if not value.requires_grad:
        raise ValueError(
            "the metric does not depend on the parameters. Compute it from `state.params`, for instance by "
            "torch.func.functional_call(model, state.params, ...)."
        )
    moving = {name: buffer for name, buffer in buffers.items() if buffer.requires_grad}
    read = torch.autograd.grad(value, [*moving.values()], retain_graph=True, allow_unused=True) if moving else ()
    if names := [name for name, gradient in zip(moving, read, strict=True) if gradient is not None]:
        raise ValueError(_buffer_message(f"the buffers {', '.join(names)}"))
    cotangent = list(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
    if wrong := not_finite("state", differentiable(state), cotangent) + not_finite(
        "the metric", value, [value.detach()]
    ):
        raise NonFiniteError(
            f"the metric is {float(value)} after {state.step} steps, and it or its gradient is not finite in "
            f"{', '.join(wrong)}."
        )
    return value.detach(), cotangent


def by_name(params: dict[str, Tensor], gradient: list[Tensor] | None) -> dict[str, Tensor] | None:
    """The part of a state's gradient that belongs to its parameters, under their names."""
    return None if gradient is None else dict(zip(params, gradient[: len(params)], strict=True))


def _buffer_message(what: str) -> str:
    return (
        f"the metric reads {what}, which training changes, and buffers are not differentiated: the gradient would be "
        "incomplete. Detach them to take them as constants: {name: b.detach() for name, b in state.buffers.items()}."
    )
