"""The derivative of a function of one number at 0, from its values alone, with an error bar."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metagrad._types import Scalar


class Slope(NamedTuple):
    """A derivative, and an estimate of its absolute error."""

    derivative: Scalar
    error: Scalar


def slope(
    function: Callable[[float], Scalar], middle: Scalar, step_size: float, num_levels: int, rounding: float
) -> Slope:
    """Central differences (φ(h) − φ(−h)) / 2h for halved h, extrapolated to h = 0 [ridders1982].

    The error bar has two parts, and the entry of the table with the smallest is taken: how far it moved from its
    neighbours, and the noise of φ divided by the h it rests on. The noise is measured from φ(h) + φ(−h) − 2φ(0), which
    the derivative does not use: what is left of it once its h² and h⁴ are eliminated is rounding (or a kink).

    Args:
        function: φ, in float64.
        middle: φ(0).
        step_size: the largest h.
        num_levels: how many h, each half of the one before.
        rounding: the least noise of φ that its precision makes possible.

    Cost: 2 · num_levels evaluations.
    """
    sizes = [step_size / 2**level for level in range(num_levels)]
    values = [(function(h), function(-h)) for h in sizes]
    differences = [(up - down) / (2 * h) for (up, down), h in zip(values, sizes, strict=True)]
    evens = [up + down - 2 * middle for up, down in values]
    best = Slope(differences[0], torch.full_like(differences[0], torch.inf))
    row = differences[:1]
    for level in range(1, num_levels):
        previous, row = row, [differences[level]]
        for order, coarse in enumerate(previous, start=1):
            refined = row[-1] + (row[-1] - coarse) / (4**order - 1)
            spread = torch.maximum((refined - row[-1]).abs(), (refined - coarse).abs())
            # Only from the coarsest h of this entry on: a jump farther out does not concern it.
            noise = _residuals(evens[level - order :]).max().clamp(min=rounding)
            error = torch.maximum(spread, noise / sizes[level])
            if error <= best.error:
                best = Slope(refined, error)
            row.append(refined)
    return best


def _residuals(evens: list[Scalar]) -> Float[Tensor, " residuals"]:
    """The sizes of what is left of φ(h) + φ(−h) − 2φ(0), at halved h, without its h² and h⁴."""
    for shrinks in (4, 16):
        if len(evens) > 2:
            evens = [fine - coarse / shrinks for coarse, fine in pairwise(evens)]
    return torch.stack(evens).abs()
