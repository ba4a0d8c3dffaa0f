"""Three orders of forward and reverse mode that give one thing: the way back through a gradient (theory.md, eq. 5, 6).

Each takes the loss of a micro-batch as a function, and cotangents γ of its gradient and of the buffers after it. It
returns Hγ and (∂²L/∂z∂θ)γ, with what comes back from the buffers. Reverse over reverse is the reference: it is right
wherever torch differentiates at all. The others refuse operations that they are not tested with, and have to prove
themselves on the loss that they are used for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from metagrad._composites import Composites
from metagrad._covered import refuse_uncovered
from metagrad._jets import JETS
from metagrad._loss import loss_gradient
from metagrad._reverse import pull_gradient
from metagrad._tree import detached, floating_leaves, fresh, grouped, joined
from metagrad._types import Params, Scalar, Tree

Evaluate: TypeAlias = Callable[[Params, Params, Tree], tuple[Scalar, Params]]
"""From parameters, buffers and metaparameters to a loss and the buffers after it: the same at each call, `Repaired`."""

Cotangents: TypeAlias = Sequence[Sequence[Tensor | None]]
"""For each metric one cotangent for each tensor; None stands for zeros."""


class Inputs(NamedTuple):
    """What a loss is evaluated at."""

    params: Params
    buffers: Params
    meta: Tree


class Pulled(NamedTuple):
    """Cotangents of `Inputs`: those of `params` in its order if asked for, the others as `floating_leaves` has them."""

    params: list[Tensor]
    buffers: list[Tensor]
    meta: list[Tensor]


Mode: TypeAlias = Callable[[Evaluate, Inputs, Cotangents, Cotangents, bool], list[Pulled]]
"""(evaluate, at, gammas, ends, wrt_params) → what is pulled back for each γ."""


def reverse_over_reverse(
    evaluate: Evaluate, at: Inputs, gammas: Cotangents, ends: Cotangents, wrt_params: bool
) -> list[Pulled]:
    """Backward passes through the graph of the gradient, which is made once.

    Cost: a gradient, and two for each γ; 2.8 times the memory of one.
    """
    at = fresh(at)
    groups = _groups(at, wrt_params)
    with torch.enable_grad():
        # Views: the gradient is that at given buffers, which may themselves depend on the parameters.
        own = {name: value.view_as(value) for name, value in at.params.items()}
        loss, after = evaluate(own, at.buffers, at.meta)
        outputs = [*loss_gradient(loss, own, keep_graph=True), *floating_leaves(after)]
    given = [[*gamma, *end] for gamma, end in zip(gammas, ends, strict=True)]
    return [Pulled(*grouped(each, groups)) for each in pull_gradient(outputs, joined(groups), given)]


def forward_over_reverse(
    evaluate: Evaluate, at: Inputs, gammas: Cotangents, ends: Cotangents, wrt_params: bool
) -> list[Pulled]:
    """The tangent of the gradient along γ: a backward pass through dual numbers.

    Cost for each γ: three gradients; 2.6 times the memory of one.
    """
    pulled = []
    for gamma, end in zip(gammas, ends, strict=True):
        own = fresh(at)
        groups = _groups(own, wrt_params)
        with torch.enable_grad(), forward_ad.dual_level():
            with Composites():
                loss, after = evaluate(_duals(own.params, gamma), own.buffers, own.meta)
            refuse_uncovered(loss)
            outputs, given = [loss], [torch.ones_like(loss)]
            for leaf, cotangent in zip(floating_leaves(after), end, strict=True):
                if cotangent is not None and leaf.requires_grad:
                    outputs.append(leaf)
                    given.append(forward_ad.make_dual(torch.zeros_like(leaf), cotangent))
            found: Sequence[Tensor | None] = [None] * sum(map(len, groups))
            if loss.requires_grad or len(outputs) > 1:
                found = torch.autograd.grad(outputs, joined(groups), given, allow_unused=True)
            tangents = [None if each is None else forward_ad.unpack_dual(each).tangent for each in found]
        filled = [torch.zeros_like(x) if t is None else t for x, t in zip(joined(groups), tangents, strict=True)]
        pulled.append(Pulled(*grouped(filled, groups)))
    return pulled


def reverse_over_forward(
    evaluate: Evaluate, at: Inputs, gammas: Cotangents, ends: Cotangents, wrt_params: bool
) -> list[Pulled]:
    """The gradient of the slope ⟨∇L, γ⟩, which is the loss's tangent along γ: a backward pass behind dual numbers.

    Cost for each γ: 8/3 gradients; twice the memory of one.
    """
    pulled = []
    for gamma, end in zip(gammas, ends, strict=True):
        own = fresh(at)
        groups = _groups(own, wrt_params)
        # Without the parameters' cotangent the slope is a function of the other inputs alone.
        params = own.params if wrt_params else detached(own.params)
        with torch.enable_grad(), forward_ad.dual_level():
            with Composites(JETS):
                loss, after = evaluate(_duals(params, gamma), own.buffers, own.meta)
            refuse_uncovered(loss)
            slope = forward_ad.unpack_dual(loss).tangent
            outputs = [forward_ad.unpack_dual(leaf).primal for leaf in floating_leaves(after)]
        # Outside the level: within it, torch would compute tangents of the backward pass as well.
        outputs, given = [loss.detach() if slope is None else slope, *outputs], [torch.ones_like(loss), *end]
        pulled.append(Pulled(*grouped(pull_gradient(outputs, joined(groups), [given])[0], groups)))
    return pulled


REFERENCE = "reverse-over-reverse"
MODES: Mapping[str, Mode] = {
    REFERENCE: reverse_over_reverse,
    "forward-over-reverse": forward_over_reverse,
    "reverse-over-forward": reverse_over_forward,
}


def _groups(at: Inputs, wrt_params: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params = list(at.params.values()) if wrt_params else []
    return params, floating_leaves(at.buffers), floating_leaves(at.meta)


def _duals(params: Params, gamma: Sequence[Tensor | None]) -> Params:
    """`params` with tangent γ. Where that is None a plain tensor does, and what depends on no other is cheaper."""
    return {
        name: value if tangent is None else forward_ad.make_dual(value, tangent)
        for (name, value), tangent in zip(params.items(), gamma, strict=True)
    }
