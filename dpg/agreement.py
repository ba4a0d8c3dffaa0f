"""Do predicted changes agree with true ones: correlations and a slope, with bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import metagrad as mg

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

ROUNDING = 1e-12
"""Changes below this share of Φ are rounding: ten thousand operations of 1e-16 each."""


class Interval(NamedTuple):
    """A statistic with its 95 % confidence interval."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.lower:.3f} to {self.upper:.3f})"


@dataclass(frozen=True, eq=False)
class Agreement:
    """Predicted and true changes of Φ; there are no statistics where one of the two does not vary beyond rounding.

    Attributes:
        pearson, spearman: correlations.
        slope: of the least-squares line through 0, true over predicted; 1 for exact predictions.
    """

    predicted: Float[Tensor, " changes"]
    true: Float[Tensor, " changes"]
    pearson: Interval | None
    spearman: Interval | None
    slope: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "predicted": self.predicted.tolist(), "true": self.true.tolist()}


def agreement(
    predicted: Float[Tensor, " changes"], true: Float[Tensor, " changes"], phi: float, seed: int = 0
) -> Agreement:
    """How well `predicted` changes of a metric that is `phi` agree with the `true` ones.

    Intervals are percentiles over 2,000 bootstrap samples of the pairs, without those in which nothing varies.
    """
    if not all(_varies(values, ROUNDING * abs(phi)) for values in (predicted, true)):
        return Agreement(predicted, true, None, None, None)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(true), (NUM_RESAMPLES, len(true)), generator=generator)
    pairs = predicted[chosen], true[chosen]
    varied = _varies(pairs[0], 0.0) & _varies(pairs[1], 0.0)
    samples = pairs[0][varied], pairs[1][varied]

    def interval(statistic: Callable[[Tensor, Tensor], Tensor]) -> Interval:
        tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
        lower, upper = statistic(*samples).quantile(tails).tolist()
        return Interval(statistic(predicted[None], true[None]).item(), lower, upper)

    return Agreement(predicted, true, interval(pearson), interval(mg.attribution.spearman), interval(slope))


def pearson(left: Float[Tensor, "rows n"], right: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """Pearson's correlation of each pair of rows."""
    centred = [values - values.mean(-1, keepdim=True) for values in (left, right)]
    return (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))


def slope(left: Float[Tensor, "rows n"], right: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """s in right ≈ s · left, by least squares, for each pair of rows."""
    return (left * right).sum(-1) / left.square().sum(-1)


def _varies(values: Float[Tensor, "*rows n"], rounding: float) -> Tensor:
    return values.amax(-1) - values.amin(-1) > rounding
