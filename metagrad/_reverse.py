"""Reverse mode for several cotangents of one graph; nothing here forms a matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metagrad._refusals import refuse_missing_derivatives


def pull_gradient(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """cᵀ ∂outputs/∂inputs by reverse mode for each c in `cotangents`; the outputs still have their graph.

    For the gradient g, with γ as cotangent and (θ, z) as inputs, these are Hγ and (∂²L/∂z∂θ)γ: reverse over reverse.
    Exact zeros where the outputs do not depend on an input.

    Cost for each cotangent: two gradients where the output is one; about 2.8 times the memory of one in all.
    """
    refuse_missing_derivatives(outputs)
    connected = [position for position, output in enumerate(outputs) if output.requires_grad]
    if not connected or not inputs:
        return [[torch.zeros_like(x) for x in inputs] for _ in cotangents]
    pulled = []
    for number, cotangent in enumerate(cotangents, start=1):
        given = [cotangent[position] for position in connected]
        gradient = torch.autograd.grad(
            [outputs[position] for position in connected],
            inputs,
            given,
            retain_graph=number < len(cotangents),
            allow_unused=True,
            materialize_grads=True,
        )
        pulled.append(list(gradient))
    return pulled
