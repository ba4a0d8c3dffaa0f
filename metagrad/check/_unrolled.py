"""The metagradient by plain autograd through all steps at once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metagrad._metric import Objective, Trajectory, value_of
from metagrad._refusals import refuse_missing_derivatives
from metagrad._tree import (
    describe,
    detached,
    differentiable,
    floating_leaves,
    fresh,
    grouped,
    joined,
    with_floating_leaves,
)
from metagrad._types import Batches, Metric, NonFiniteError, Result, Scalar, State, Step, Tree
from metagrad.check._runs import begin


def unrolled(
    metric: Metric | Trajectory | Sequence[Metric | Trajectory],
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    wrt_params: bool = False,
) -> Result:
    """The metagradient by plain autograd through every step at once: no schedule, no pullback, nothing shared with it.

    Args and returns: those of `metagradient`; `stats` is None. With a list of K metrics the value has shape (K,), and
        every gradient a leading axis of length K.

    Raises:
        ValueError: for no metric, one that is not a function or returns no floating-point scalar, a metric that depends
            on nothing that is differentiated, and as `metagradient` does before training.
        NonFiniteError: if Φ is NaN or infinite.

    Cost: 9 forward passes a step (6 more for each further metric), and the activations of all steps in memory.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(lambda p, b, meta: (p["w"] - b) ** 2, lambda meta: mg.optim.sgd(lr=meta["lr"]))
        >>> lr = torch.tensor(0.25)
        >>> mg.check.unrolled(
        ...     lambda state: state.params["w"] + 0, step, {"w": torch.tensor(0.0)}, [torch.tensor([2.0])], {"lr": lr}
        ... ).meta["lr"]  # w = 2 · lr · 2
        tensor(4.)
    """
    running, initial = begin(step, params, batches, meta)
    objective = Objective.of(metric, len(batches))
    # Fresh leaves: the derivative is taken with respect to these values.
    variables, starts = fresh(meta), fresh(differentiable(initial))
    state = initial._replace(**starts._asdict()) if wrt_params else initial
    values: list[Scalar | None] = [None for _ in objective.terms]
    with torch.enable_grad():
        for t in range(len(batches) + 1):
            for k, steps in enumerate(objective.terms):
                if t in steps:
                    new, before = _value(steps[t], state), values[k]
                    values[k] = new if before is None else before + new
            if t < len(batches):
                state = running(state, batches[t], variables)
    found = [value for value in values if value is not None]
    if not all(value.requires_grad for value in found):
        raise ValueError(
            "the metric depends on nothing that is differentiated. Compute it from `state.params`, without detach or "
            "torch.no_grad, in the loss, the optimizer and the metric."
        )
    refuse_missing_derivatives(found)
    groups = (floating_leaves(variables), *(floating_leaves(part) if wrt_params else [] for part in starts))
    gradients = [
        torch.autograd.grad(v, joined(groups), allow_unused=True, materialize_grads=True, retain_graph=True)
        for v in found
    ]
    to_meta, *to_state = grouped(objective.stacked(gradients), groups)
    initial_gradients = [None, None, None]
    if wrt_params:
        pairs = zip(starts, to_state, strict=True)
        initial_gradients = [with_floating_leaves(part, gradient, keep_others=False) for part, gradient in pairs]
    return Result(
        value=objective.stacked([[value.detach()] for value in found])[0],
        meta=with_floating_leaves(meta, to_meta, keep_others=False),
        params=initial_gradients[0],
        state=detached(state),
        stats=None,
        optimizer=initial_gradients[1],
        buffers=initial_gradients[2],
    )


def _value(metric: Metric, state: State) -> Scalar:
    phi = value_of(metric, state)
    if not isinstance(phi, Tensor) or phi.ndim != 0 or not phi.is_floating_point():
        raise ValueError(f"the metric returned {describe(phi)}. Return a floating-point scalar, shape ().")
    if not bool(torch.isfinite(phi.detach())):
        raise NonFiniteError(f"the metric is {float(phi.detach())} after {state.step} steps.")
    return phi
