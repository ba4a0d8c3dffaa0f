"""Second derivatives of one step's loss by forward mode, contracted with the cotangent γ (docs/theory.md, eq. 6)."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metagrad._tree import floating_leaves
from metagrad._types import Params, Scalar

Contribution: TypeAlias = Callable[[Scalar], list[Tensor]]
"""What one micro-batch's share of the loss adds to a sum over the batch."""


class Slope(NamedTuple):
    """⟨∇L, γ⟩, and the sum of the sizes of its terms."""

    value: Scalar
    size: Scalar


def pull_forward(
    total: Callable[[Contribution, Params], list[Tensor]],
    params: Params,
    gamma: Sequence[Tensor | None],
    slope: Slope,
    inputs: Sequence[Tensor],
) -> list[Tensor] | None:
    """(∂²L/∂z∂θ)γ for a loss that is linear in z = `inputs`, without any backward through θ: ∂⟨∇L, γ⟩/∂z.

    Linear, and nothing after it: torch differentiates some forward-mode formulas wrongly (layer_norm among them), and
    silently, so the pass through z must be a plain product. The result is checked against the reverse-mode gradient.

    Args:
        total: sums a contribution of the loss over the micro-batches, for given parameters.
        slope: of L along γ, by reverse mode.

    Returns:
        None, after a warning, where forward mode cannot do this loss.

    Cost: one forward-mode pass; a forward pass wherever γ is zero.
    """
    try:
        with torch.enable_grad(), forward_ad.dual_level(), _StoppedGradients() as stopped:
            pulled = total(lambda loss: _tangent_gradient(loss, inputs), _as_duals(params, gamma))
        reason = "it stops gradients by torch.no_grad, which forward mode passes by" if stopped.found else None
        if not _agrees(inputs, pulled, slope, params):
            reason = "it differs from the reverse-mode gradient"
    except NotImplementedError as error:
        reason = str(error).splitlines()[0]
    if reason is None:
        return pulled
    warnings.warn(
        f"forward mode does not work for this loss ({reason}); a second backward pass takes its place, as exact and "
        "slower. Stopping gradients by detach instead of torch.no_grad may help.",
        stacklevel=2,
    )
    return None


def slope_of(gradient: Sequence[Tensor], gamma: Sequence[Tensor | None]) -> Slope:
    """That of a loss with this gradient; one tensor at a time, for they are many numbers."""
    value = size = torch.zeros((), device=gradient[0].device)
    with torch.no_grad():
        for one, other in zip(gradient, gamma, strict=True):
            if other is not None:
                terms = one * other
                value, size = value + terms.sum(), size + terms.abs().sum()
    return Slope(value, size)


class _StoppedGradients(TorchFunctionMode):
    """Notes whether an operation under `torch.no_grad` makes a tensor with a tangent, which reverse mode would stop."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled() and not self.found:
            self.found = any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in floating_leaves(output))
        return output


def _as_duals(params: Params, gamma: Sequence[Tensor | None]) -> Params:
    """`params` with tangent γ. Where γ is zero a plain tensor does, and what depends on no other is cheaper."""
    return {
        name: value.detach() if tangent is None else forward_ad.make_dual(value.detach(), tangent)
        for (name, value), tangent in zip(params.items(), gamma, strict=True)
    }


def _tangent_gradient(loss: Scalar, inputs: Sequence[Tensor]) -> list[Tensor]:
    tangent = forward_ad.unpack_dual(loss).tangent
    if tangent is None or not tangent.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(tangent, inputs, allow_unused=True, materialize_grads=True))


def _agrees(inputs: Sequence[Tensor], pulled: Sequence[Tensor], slope: Slope, params: Params) -> bool:
    """Whether ⟨z, (∂²L/∂z∂θ)γ⟩ = ⟨∇L, γ⟩, as it must be for a loss linear in z.

    It is not where a custom function's two derivatives differ, say. The tolerance is the square root of the coarsest
    precision: far above rounding, far below a missing term.
    """
    with torch.no_grad():
        left = slope_of(inputs, pulled)
        gap = (left.value - slope.value).abs()
    precision = max(torch.finfo(tensor.dtype).eps for tensor in (*inputs, *params.values()))
    tolerance = precision**0.5 * (left.size + slope.size)
    # A gap that is not finite is no disagreement: the replay reports it, by name.
    return not bool(gap > tolerance)
