"""Second derivatives of one step's loss, contracted with the cotangent γ of its gradient (docs/theory.md, eq. 6).

Nothing here forms a matrix: both functions return products with γ.
"""

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metagrad._types import Params, Scalar


def pull_gradient(gradient: Sequence[Tensor], inputs: Sequence[Tensor], gamma: Sequence[Tensor]) -> list[Tensor]:
    """γᵀ ∂g/∂inputs by reverse over reverse, for a gradient g that still has its graph.

    With inputs (θ, z) these are Hγ and (∂²L/∂z∂θ)γ. Exact zeros where g does not depend on an input.
    Cost: two gradients, and about 2.8 times the memory of one.
    """
    connected = [(g, c) for g, c in zip(gradient, gamma, strict=True) if g.requires_grad]
    if not connected or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    outputs, cotangents = zip(*connected, strict=True)
    return list(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True))


def as_duals(params: Params, gamma: Sequence[Tensor]) -> Params:
    """`params` as dual numbers with tangent γ; call inside `forward_ad.dual_level()`.

    A parameter whose γ is exactly zero stays a plain tensor: what depends on no other costs a forward pass only.
    """
    return {
        name: forward_ad.make_dual(value.detach(), tangent) if tangent.any() else value.detach()
        for (name, value), tangent in zip(params.items(), gamma, strict=True)
    }


def pull_directional(loss: Scalar, inputs: Sequence[Tensor]) -> list[Tensor]:
    """∂⟨∇_θ L, γ⟩/∂inputs for a loss computed on `as_duals(params, γ)`: (∂²L/∂z∂θ)γ without a backward through θ.

    Cost: one forward-mode pass, which the caller has run. Sound only where `inputs` enter L linearly and last: torch
    differentiates some forward-mode formulas wrongly (layer_norm among them), and silently.
    """
    tangent = forward_ad.unpack_dual(loss).tangent
    if tangent is None or not tangent.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(tangent, inputs, allow_unused=True, materialize_grads=True))
