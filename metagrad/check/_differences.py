"""The metagradient along random directions, by training again at metaparameters moved a little."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import optree
import torch
from jaxtyping import Float
from torch import Tensor, nn

from metagrad._tree import describe, floating_leaves
from metagrad._types import Batches, Metric, NonFiniteError, Result, Scalar, State, Step, Tree
from metagrad.check._runs import begin, dot, measured, moved, one_metric, precision_of, random_like, trained
from metagrad.check._slope import Slope, slope
from metagrad.check._verdict import Comparison, row


class FiniteDifferences(NamedTuple):
    """Directional derivatives of Φ by finite differences.

    Attributes:
        meta_directions: one tree like `meta` per direction.
        params_directions: one dict like `params` per direction; empty dicts unless asked for.
        derivatives: dΦ along each direction.
        errors: estimated absolute error of each.
        value: Φ of the run itself.
        precision: relative spacing of the numbers that the run computes with.
    """

    meta_directions: list[Tree]
    params_directions: list[dict[str, Tensor]]
    derivatives: Float[Tensor, " directions"]
    errors: Float[Tensor, " directions"]
    value: Scalar
    precision: float

    def compare(self, result: Result) -> Comparison:
        """The metagradient beside these differences: what agrees within the error bars, what does not.

        Two numbers disagree if they are more than three error bars apart, plus the rounding of the metagradient
        itself. They agree if they are not and the error bar is at most a hundredth of them, or a millionth of Φ where
        both are zero. Between the two one "cannot tell".

        Raises:
            ValueError: if `result` belongs to another run, lacks the gradient of the initial parameters where the
                differences have it, or holds several metrics.
        """
        size = abs(float(self.value))
        return Comparison(
            [
                row(f"{number}", value, Slope(derivative, error), size, self.precision)
                for number, (value, derivative, error) in enumerate(
                    zip(self._products(result).tolist(), self.derivatives, self.errors, strict=True)
                )
            ]
        )

    def relative_error(self, result: Result) -> Float[Tensor, " directions"]:
        """|⟨gradient, direction⟩ − derivative| / |derivative| for each direction; infinite where only that is zero.

        Raises:
            ValueError: as `compare` does.
        """
        gaps = (self._products(result) - self.derivatives).abs()
        return torch.where(gaps == 0, gaps, gaps / self.derivatives.abs())

    def __str__(self) -> str:
        lines = [
            f"{number:9d}  {float(derivative):14.6e}  {float(error):8.0e}"
            for number, (derivative, error) in enumerate(zip(self.derivatives, self.errors, strict=True))
        ]
        return "\n".join([f"direction  {'difference':>14s}  +- error", *lines])

    def _products(self, result: Result) -> Float[Tensor, " directions"]:
        """⟨gradient, direction⟩ for each direction."""
        _refuse_another_run(self, result)
        return torch.stack(
            [
                dot(result.meta, meta) + dot({name: (result.params or {})[name] for name in params}, params)
                for meta, params in zip(self.meta_directions, self.params_directions, strict=True)
            ]
        )


def finite_differences(
    metric: Metric,
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    wrt_params: bool = False,
    num_directions: int = 3,
    step_size: float = 1e-2,
    num_levels: int = 6,
    seed: int = 0,
) -> FiniteDifferences:
    """Derivatives of Φ along random directions by central differences, extrapolated to step size 0 [ridders1982].

    Args:
        metric, step, params, batches, meta, wrt_params: as for `metagradient`; one metric.
        num_directions: how many random directions.
        step_size: the largest step, in units of each tensor's root mean square (1 for a tensor of zeros). Smaller for
            a metaparameter near the end of its range, such as a beta of 0.999.
        num_levels: how many step sizes, each half of the one before.
        seed: of the directions.

    Returns:
        The directions, the derivatives and their estimated errors; `compare(result)` judges a metagradient.

    Raises:
        ValueError: for several metrics, nothing to move along, settings out of range, and as `metagradient` does.
        NonFiniteError: if Φ is NaN or infinite, saying how far everything was moved.

    Cost: 1 + 2 · num_levels · num_directions training runs. Use float64: in float32 the differences drown in rounding,
        and the error bars say so.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(lambda p, b, meta: (p["w"] - b) ** 2, lambda meta: mg.optim.sgd(lr=meta["lr"]))
        >>> run = (
        ...     lambda state: state.params["w"] ** 2, step,
        ...     {"w": torch.tensor(0.0, dtype=torch.float64)}, [torch.tensor([2.0], dtype=torch.float64)],
        ...     {"lr": torch.tensor(0.25, dtype=torch.float64)},
        ... )
        >>> differences = mg.check.finite_differences(*run)
        >>> differences.compare(mg.metagradient(*run)).verdict
        'agree'
    """
    one_metric(metric, "finite_differences")
    _refuse_settings(num_directions, step_size, num_levels)
    running, initial = begin(step, params, batches, meta)
    if not floating_leaves(meta) and not wrt_params:
        raise ValueError(f"`meta` is {describe(meta)}: no floating-point tensor to move. Pass one, or wrt_params=True.")
    precision = precision_of((initial.params, meta))
    value = measured(metric, trained(running, initial, batches, meta))
    generator = torch.Generator().manual_seed(seed)
    directions, slopes = [], []
    for _ in range(num_directions):
        toward = random_like(meta, generator), random_like(initial.params if wrt_params else {}, generator)
        line = _Line(metric, running, initial, batches, meta, *toward)
        slopes.append(slope(line, value, step_size, num_levels, precision * abs(float(value))))
        directions.append(toward)
    return FiniteDifferences(
        [meta_direction for meta_direction, _ in directions],
        [params_direction for _, params_direction in directions],
        torch.stack([found.derivative for found in slopes]),
        torch.stack([found.error for found in slopes]),
        value,
        precision,
    )


@dataclass(frozen=True)
class _Line:
    """Φ as a function of how far metaparameters and initial parameters are moved along one direction."""

    metric: Metric
    step: Step
    initial: State
    batches: Batches
    meta: Tree
    meta_direction: Tree
    params_direction: Tree

    def __call__(self, distance: float) -> Scalar:
        params = moved(self.initial.params, self.params_direction, distance) if self.params_direction else None
        start = self.initial if params is None else self.initial._replace(params=params)
        try:
            end = trained(self.step, start, self.batches, moved(self.meta, self.meta_direction, distance))
            return measured(self.metric, end)
        except (NonFiniteError, ValueError) as error:
            raise (NonFiniteError if isinstance(error, NonFiniteError) else ValueError)(
                f"{error} This is the run with everything moved by {abs(distance):.0e} of its size; the run itself is "
                "well. Pass a smaller `step_size`, or a metaparameter that may take any value, such as log(lr)."
            ) from error


def _refuse_settings(num_directions: int, step_size: float, num_levels: int) -> None:
    if num_directions < 1:
        raise ValueError(f"`num_directions` is {num_directions}. Pass at least 1.")
    refuse_step_settings(step_size, num_levels)


def refuse_step_settings(step_size: float, num_levels: int) -> None:
    """Raise a ValueError unless the differences can be extrapolated."""
    if not 0 < step_size < float("inf"):
        raise ValueError(f"`step_size` is {step_size}. Pass a number above 0, such as 1e-2.")
    if num_levels < 2:
        raise ValueError(f"`num_levels` is {num_levels}. Pass at least 2: an error bar needs two step sizes.")


def _refuse_another_run(differences: FiniteDifferences, result: Result) -> None:
    if result.value.ndim > 0:
        raise ValueError(
            f"`result` holds {len(result.value)} metrics, and these differences one. Compare a result of that metric."
        )
    meta, params = differences.meta_directions[0], differences.params_directions[0]
    if _shapes(result.meta) != _shapes(meta):
        raise ValueError(
            f"the gradient in `result.meta` is {describe(result.meta)}, but these differences moved {describe(meta)}. "
            "Compare the result of the same run."
        )
    if params and result.params is None:
        raise ValueError(
            "the differences moved the initial parameters too, but `result.params` is None. Pass wrt_params=True to "
            "`metagradient`, or wrt_params=False to `finite_differences`."
        )
    if params and _shapes(dict(result.params or {})) != _shapes(params):
        raise ValueError(
            f"the gradient in `result.params` is {describe(dict(result.params or {}))}, but these differences moved "
            f"{describe(params)}. Compare the result of the same run."
        )
    given, own = float(result.value), float(differences.value)
    if abs(given - own) > differences.precision**0.5 * max(abs(given), abs(own)):
        raise ValueError(
            f"`result.value` is {given:.6g}, but the metric of this run is {own:.6g}: `result` belongs to another "
            "metric, step, batches or metaparameters, or the run is not the same twice (mg.check.determinism tells)."
        )


def _shapes(tree: Tree) -> tuple[object, list[torch.Size]]:
    return optree.tree_structure(tree), [leaf.shape for leaf in floating_leaves(tree)]
