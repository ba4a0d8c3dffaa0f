"""Second derivatives of one step's loss by forward mode, contracted with the cotangent γ (docs/theory.md, eq. 6)."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metagrad._tree import floating_leaves
from metagrad._types import Params, Scalar

Contribution: TypeAlias = Callable[[Scalar], list[Tensor]]
"""What one micro-batch's share of the loss adds to a sum over the batch."""


def pull_forward(
    total: Callable[[Contribution, Params], list[Tensor]],
    params: Params,
    gradient: Sequence[Tensor],
    gamma: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
) -> list[Tensor] | None:
    """(∂²L/∂z∂θ)γ for a loss that is linear in z = `inputs`, without any backward through θ: ∂⟨∇L, γ⟩/∂z.

    Linear, and nothing after it: torch differentiates some forward-mode formulas wrongly (layer_norm among them), and
    silently, so the pass through z must be a plain product. The result is checked against the reverse-mode gradient.

    Args:
        total: sums a contribution of the loss over the micro-batches, for given parameters.
        gradient: ∇_θ L by reverse mode.

    Returns:
        None, after a warning, where forward mode cannot do this loss.

    Cost: one forward-mode pass; a forward pass wherever γ is zero.
    """
    try:
        with torch.enable_grad(), forward_ad.dual_level(), _StoppedGradients() as stopped:
            pulled = total(lambda loss: _tangent_gradient(loss, inputs), _as_duals(params, gamma))
        reason = "it stops gradients by torch.no_grad, which forward mode passes by" if stopped.found else None
        if not _agrees(inputs, pulled, gradient, gamma):
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


def _agrees(
    inputs: Sequence[Tensor], pulled: Sequence[Tensor], gradient: Sequence[Tensor], gamma: Sequence[Tensor | None]
) -> bool:
    """Whether ⟨z, (∂²L/∂z∂θ)γ⟩ = ⟨∇L, γ⟩, as it must be for a loss linear in z.

    It is not where a custom function's two derivatives differ, say. The tolerance is the square root of the coarsest
    precision: far above rounding, far below a missing term.
    """
    with torch.no_grad():
        left, left_size = _product(inputs, pulled)
        right, right_size = _product(gradient, gamma)
        gap = (left - right).abs()
    precision = max(torch.finfo(tensor.dtype).eps for tensor in (*inputs, *gradient))
    tolerance = precision**0.5 * (left_size + right_size)
    # A gap that is not finite is no disagreement: the replay reports it, by name.
    return not bool(gap > tolerance)


def _product(left: Sequence[Tensor], right: Sequence[Tensor | None]) -> tuple[Scalar, Scalar]:
    """⟨left, right⟩ and the sum of its terms without their signs; one tensor at a time, for they are many numbers."""
    total = size = torch.zeros((), device=left[0].device)
    for one, other in zip(left, right, strict=True):
        if other is not None:
            terms = one * other
            total, size = total + terms.sum(), size + terms.abs().sum()
    return total, size
