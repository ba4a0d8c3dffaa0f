"""Reverse mode for several cotangents of one graph; nothing here forms a matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metagrad._refusals import refuse_missing_derivatives

CORNER = 8


def pull_gradient(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Sequence[Tensor | None]],
    retain_graph: bool = False,
) -> list[list[Tensor]]:
    """cᵀ ∂outputs/∂inputs by reverse mode for each c in `cotangents`; the outputs still have their graph.

    For the gradient g, with γ as cotangent and (θ, z) as inputs, these are Hγ and (∂²L/∂z∂θ)γ: reverse over reverse.
    Exact zeros where the outputs do not depend on an input. Nothing is done for a cotangent of None, which is zeros.

    Cost for each cotangent: two gradients where the output is one; about 2.8 times the memory of one in all.
    """
    refuse_missing_derivatives(outputs)
    pulled = []
    for number, cotangent in enumerate(cotangents, start=1):
        pairs = [
            (output, c) for output, c in zip(outputs, cotangent, strict=True) if output.requires_grad and c is not None
        ]
        if not pairs or not inputs:
            pulled.append([torch.zeros_like(x) for x in inputs])
            continue
        gradient = torch.autograd.grad(
            [output for output, _ in pairs],
            inputs,
            [c for _, c in pairs],
            retain_graph=retain_graph or number < len(cotangents),
            allow_unused=True,
            materialize_grads=True,
        )
        pulled.append(list(gradient))
    return pulled


def nonzero(cotangent: Sequence[Tensor]) -> list[Tensor | None]:
    """`cotangent` with None for tensors that are all zeros, behind which nothing need be computed."""
    # Most are seen not to be by a corner of theirs; the others are read to the end.
    some = _any([leaf[(slice(CORNER),) * leaf.ndim] for leaf in cotangent])
    rest = iter(_any([leaf for leaf, found in zip(cotangent, some, strict=True) if not found]))
    return [leaf if found or next(rest) else None for leaf, found in zip(cotangent, some, strict=True)]


def _any(leaves: Sequence[Tensor]) -> list[bool]:
    # Asked together: on an accelerator each answer waits for the device.
    found: list[bool] = torch.stack([leaf.any() for leaf in leaves]).tolist() if leaves else []
    return found
