"""Metasmoothness: whether a run responds so evenly to its metaparameters that a gradient step has a meaning."""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from typing import NamedTuple

import optree
import torch
from jaxtyping import Float
from torch import Tensor, nn

from metagrad._tree import describe, floating_leaves
from metagrad._types import Batches, Metric, NonFiniteError, Scalar, State, Step, Tree
from metagrad.check._runs import begin, measured, moved, one_metric, random_like, trained

CONFIDENCE = 0.95
NEAR, FAR = 0.9, 0.5  # Our convention for the words of the report; the numbers stand beside them.


class Mean(NamedTuple):
    """A mean over directions with its 95 % confidence interval."""

    mean: float
    lower: float
    upper: float


class Metasmoothness(NamedTuple):
    """How evenly a run responds, for each step size h (first axis) and direction (second).

    Attributes:
        step_sizes: h.
        agreement: S, in parameter space, between −1 and 1.
        curvature: |Φ(z + 2hv) − 2Φ(z + hv) + Φ(z)| / h², the function's own; smaller is smoother.
    """

    step_sizes: tuple[float, ...]
    agreement: Float[Tensor, "sizes directions"]
    curvature: Float[Tensor, "sizes directions"]

    def mean_agreement(self, index: int = 0) -> Mean:
        """The mean of S over the directions, for one of the step sizes."""
        return _interval(self.agreement[index], -1.0, 1.0)

    def mean_curvature(self, index: int = 0) -> Mean:
        """The mean of the curvature over the directions, for one of the step sizes."""
        return _interval(self.curvature[index], 0.0, inf)

    def __str__(self) -> str:
        lines = [f"{'h':>8s}  {'S':>5s}  {'95 % interval':>15s}  {'curvature':>9s}  reading"]
        for index, h in enumerate(self.step_sizes):
            found, curvature = self.mean_agreement(index), self.mean_curvature(index)
            interval = f"{found.lower:.2f} to {found.upper:.2f}"
            lines.append(f"{h:8.0e}  {found.mean:5.2f}  {interval:>15s}  {curvature.mean:9.1e}  {_reading(found)}")
        num_directions = self.agreement.shape[1]
        lines.append(
            f"Means over {num_directions} directions; S from -1 to 1, the curvature to be compared at one h only."
            if num_directions > 1
            else "One direction, which gives no interval: pass num_directions=3 or more."
        )
        return "\n".join(lines)


def metasmoothness(
    metric: Metric,
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    step_sizes: float | Sequence[float] = 0.1,
    num_directions: int = 4,
    directions: Sequence[Tree] | None = None,
    seed: int = 0,
) -> Metasmoothness:
    """Whether training responds evenly to a change of its metaparameters, by both definitions of [engstrom2025].

    Train at z, z + hv and z + 2hv: parameters θ₀, θ₁, θ₂ and metrics Φ₀, Φ₁, Φ₂. Then, with d = |θ₂ − θ₀|,

        S = Σ_j (d_j / Σ_k d_k) · sign(θ₁ − θ₀)_j · sign(θ₂ − θ₁)_j      curvature = |Φ₂ − 2Φ₁ + Φ₀| / h²

    The interval of the mean is Student's t over the directions, cut to the range of S: directions are drawn
    independently, and with few of them it is honestly wide, where resampling them (bootstrap) is too narrow.

    Args:
        metric, step, params, batches, meta: as for `metagradient`; one metric.
        step_sizes: h, or several, in units of each direction: as large as the changes one intends.
        num_directions: how many random directions v, in units of each tensor's root mean square (1 for zeros).
        directions: trees like `meta` to move along instead, such as a change one intends.
        seed: of the random directions.

    Returns:
        S and the curvature for every h and direction; prints with means, intervals and a reading in words: "near 1" if
        the whole interval is above 0.9, "far from 1" if it is below 0.5.

    Raises:
        ValueError: for several metrics, nothing to move along, directions of another shape, settings out of range, a
            run that does not respond at all, and as `metagradient` does before training.
        NonFiniteError: if Φ is NaN or infinite, saying how far the metaparameters were moved.

    Cost: three trainings a direction and h, of which the one at z is made once: 1 + 2 · directions · step sizes. No
        metagradient.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(lambda p, b, meta: (p["w"] - meta["target"]) ** 2, mg.optim.sgd(lr=0.1))
        >>> found = mg.check.metasmoothness(  # w is linear in the target
        ...     lambda state: state.params["w"].sum(), step, {"w": torch.zeros(3)}, [None] * 5,
        ...     {"target": torch.ones(3)},
        ... )
        >>> found.mean_agreement()
        Mean(mean=1.0, lower=1.0, upper=1.0)
    """
    one_metric(metric, "metasmoothness")
    sizes = tuple(step_sizes) if isinstance(step_sizes, Sequence) else (step_sizes,)
    if not sizes or not all(0 < h < inf for h in sizes):
        raise ValueError(f"`step_sizes` is {step_sizes}. Pass a number above 0, or several.")
    running, initial = begin(step, params, batches, meta)
    toward = _directions(meta, num_directions, directions, seed)
    start = _end(metric, running, initial, batches, meta)
    agreement, curvature = [], []
    for h in sizes:
        for v in toward:
            try:
                ends = [_end(metric, running, initial, batches, moved(meta, v, k * h)) for k in (1, 2)]
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"{error} This is a run moved by up to 2 h = {2 * h:.0e}: pass smaller h."
                ) from error
            agreement.append(_agreement(start.params, *(end.params for end in ends)))
            curvature.append((ends[1].phi - 2 * ends[0].phi + start.phi).abs() / h**2)
    shape = len(sizes), len(toward)
    return Metasmoothness(sizes, torch.stack(agreement).reshape(shape), torch.stack(curvature).reshape(shape))


class _End(NamedTuple):
    """Where a run arrived: all trained parameters as one vector, and Φ."""

    params: Float[Tensor, " params"]
    phi: Scalar


def _end(metric: Metric, step: Step, initial: State, batches: Batches, meta: Tree) -> _End:
    state = trained(step, initial, batches, meta)
    flat = torch.cat([leaf.detach().flatten().double().cpu() for leaf in state.params.values()])
    return _End(flat, measured(metric, state))


def _agreement(
    first: Float[Tensor, " params"], second: Float[Tensor, " params"], third: Float[Tensor, " params"]
) -> Scalar:
    distance = (third - first).abs()
    if not bool(distance.any()):
        raise ValueError(
            "the trained parameters do not change with the metaparameters, so S is 0/0. Pass larger `step_sizes`, or "
            "metaparameters that training reads."
        )
    return (distance / distance.sum() * (second - first).sign() * (third - second).sign()).sum()


def _directions(meta: Tree, num_directions: int, given: Sequence[Tree] | None, seed: int) -> list[Tree]:
    leaves = floating_leaves(meta)
    if not leaves:
        raise ValueError(f"`meta` is {describe(meta)}: no floating-point tensor to move. Pass at least one.")
    if given is None:
        if num_directions < 1:
            raise ValueError(f"`num_directions` is {num_directions}. Pass at least 1.")
        generator = torch.Generator().manual_seed(seed)
        return [random_like(meta, generator) for _ in range(num_directions)]
    if not given:
        raise ValueError("`directions` is empty. Pass at least one tree like `meta`, or None for random ones.")
    for direction in given:
        shapes = [leaf.shape for leaf in floating_leaves(direction)]
        if shapes != [leaf.shape for leaf in leaves] or optree.tree_paths(direction) != optree.tree_paths(meta):
            raise ValueError(
                f"a direction is {describe(direction)}, but `meta` is {describe(meta)}. Pass a tree like it."
            )
    return list(given)


def _interval(values: Float[Tensor, " directions"], lowest: float, highest: float) -> Mean:
    """The mean with Student's interval, cut to the range that the mean can have."""
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Mean(mean, lowest, highest)
    half = student_quantile(count - 1) * float(values.std()) / sqrt(count)
    return Mean(mean, max(lowest, mean - half), min(highest, mean + half))


def student_quantile(freedom: int) -> float:
    """t with P(|T| ≤ t) = 0.95 for Student's distribution.

    With T = √ν tan φ the density is proportional to cos^(ν−1) φ, which is summed on a fine grid of angles.
    """
    edges = torch.linspace(0, torch.pi / 2, 200_001, dtype=torch.float64)
    density = ((edges[1:] + edges[:-1]) / 2).cos() ** (freedom - 1)
    below = density.cumsum(0) / density.sum()
    angle = edges[1:][torch.searchsorted(below, CONFIDENCE)]
    return float(sqrt(freedom) * angle.tan())


def _reading(found: Mean) -> str:
    if found.lower >= NEAR:
        return "near 1: metagradients are usable for changes of this size"
    if found.upper < FAR:
        return "far from 1: the response changes direction; a metagradient says little about changes of this size"
    if found.lower < FAR and found.upper >= NEAR:
        return "cannot tell: pass more directions"
    return "between: the response is uneven; a metagradient is a rough guide to changes of this size"
