"""Activations with their second derivatives written out; torch has the first as one operation each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import pi, sqrt

import torch
from torch import Tensor

from metagrad._formulas import Formulas, Saved, aten


@dataclass(frozen=True)
class Activation(Formulas):
    """y = f(x) for each entry, so J is diagonal.

    Attributes:
        function: f.
        slope: c·f′(x) from c and x.
        curvature: f″(x) as a new tensor.
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]

    def value(self, x: Tensor) -> tuple[Tensor, Saved]:
        return self.function(x), (x,)

    def push(self, saved: Saved, tangent: Tensor) -> tuple[Tensor, Saved]:
        return self.slope(tangent, saved[0]), (tangent,)

    def pull(self, saved: Saved, cotangent: Tensor) -> Tensor:
        return self.slope(cotangent, saved[0])

    def second(self, saved: Saved, pushed: Saved, cotangent: Tensor) -> Tensor:
        return self.curvature(saved[0]).mul_(cotangent).mul_(pushed[0])


def _silu(x: Tensor) -> Tensor:
    # With s the sigmoid: s(1 − s)(2 + x(1 − 2s)).
    s = x.sigmoid()
    return (1 - 2 * s).mul_(x).add_(2).mul_(s).mul_(1 - s)


def _mish(x: Tensor) -> Tensor:
    # y = x·w with w = tanh(softplus(x)), so y″ = 2w′ + x·w″, w′ = s(1 − w²), w″ = w′(1 − s − 2ws).
    s, w = x.sigmoid(), torch.nn.functional.softplus(x).tanh()
    slope = (1 - w * w).mul_(s)
    return (2 * w).add_(1).mul_(s).neg_().add_(1).mul_(x).add_(2).mul_(slope)


def _gelu(x: Tensor) -> Tensor:
    # With φ the normal density: φ(x)(2 − x²).
    square = x * x
    return (square * -0.5).exp_().mul_(1 / sqrt(2 * pi)).mul_(square.neg_().add_(2))


def _gelu_tanh(x: Tensor) -> Tensor:
    # y = x(1 + w)/2 with w = tanh(u), u = k(x + c·x³), so y″ = (1 − w²)(u′ + x·u″/2 − x·w·u′²).
    k, c = sqrt(2 / pi), 0.044715
    square = x * x
    w = (square * c).add_(1).mul_(x).mul_(k).tanh_()
    slope = (square * (3 * c)).add_(1).mul_(k)
    inner = square.mul_(3 * k * c).add_(slope)
    inner -= (x * w).mul_(slope).mul_(slope)
    return w.square_().neg_().add_(1).mul_(inner)


SILU = Activation(aten.silu, aten.silu_backward, _silu)
MISH = Activation(aten.mish, aten.mish_backward, _mish)
GELU = {
    "none": Activation(aten.gelu, aten.gelu_backward, _gelu),
    "tanh": Activation(
        partial(aten.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh"), _gelu_tanh
    ),
}
