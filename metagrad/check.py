"""Referees: slower, simpler ways to the same numbers. They never use the replay they check."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metagrad._custom import as_linear
from metagrad._metric import checked_value, value_of
from metagrad._refusals import refuse_missing_derivatives
from metagrad._tree import (
    detached,
    floating_leaves,
    fresh,
    independent,
    names,
    same_bits,
    tensor_leaves,
    with_floating_leaves,
)
from metagrad._types import Batches, Metric, NonFiniteError, ReplayMismatchError, Result, State, Step, Tree


class FiniteDifferences(NamedTuple):
    """Directional derivatives of Φ by finite differences.

    Attributes:
        meta_directions: one tree like `meta` per direction.
        params_directions: one dict like `params` per direction; empty dicts unless asked for.
        derivatives: dΦ along each direction.
        errors: estimated absolute error of each.
    """

    meta_directions: list[Tree]
    params_directions: list[dict[str, Tensor]]
    derivatives: Float[Tensor, " directions"]
    errors: Float[Tensor, " directions"]

    def relative_error(self, result: Result) -> Float[Tensor, " directions"]:
        """|⟨gradient, direction⟩ − derivative| / |derivative| for each direction."""
        products = [
            _dot(result.meta, meta) + _dot({name: (result.params or {})[name] for name in params}, params)
            for meta, params in zip(self.meta_directions, self.params_directions, strict=True)
        ]
        return (torch.stack(products) - self.derivatives).abs() / self.derivatives.abs()


def finite_differences(
    metric: Metric,
    step: Step,
    params: Mapping[str, Tensor] | nn.Module,
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
        metric, step, params, batches, meta, wrt_params: as for `metagradient`.
        num_directions: how many random directions.
        step_size: the largest step, in units of each tensor's root mean square (1 for a tensor of zeros).
        num_levels: how often the step is halved.
        seed: of the directions.

    Returns:
        The directions, the derivatives and their estimated errors; `relative_error(result)` compares a metagradient.

    Cost: 2 · num_levels · num_directions training runs. Use float64: in float32 the differences drown in rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    step = as_linear(step)
    initial = step.init(params, meta)
    meta_directions, params_directions, derivatives, errors = [], [], [], []
    for _ in range(num_directions):
        toward = _random_like(meta, generator)
        start_toward = _random_like(initial.params, generator) if wrt_params else {}

        def difference(h: float, toward: Tree = toward, start_toward: Mapping[str, Tensor] = start_toward) -> Tensor:
            ends = []
            for sign in (h, -h):
                moved = {name: p + sign * start_toward[name] if wrt_params else p for name, p in initial.params.items()}
                start = initial._replace(params=moved)
                ends.append(_phi(metric, step, start, batches, _moved(meta, toward, sign)))
            return (ends[0] - ends[1]) / (2 * h)

        derivative, error = _extrapolate([difference(step_size / 2**level) for level in range(num_levels)])
        meta_directions.append(toward)
        params_directions.append(start_toward)
        derivatives.append(derivative)
        errors.append(error)
    return FiniteDifferences(meta_directions, params_directions, torch.stack(derivatives), torch.stack(errors))


def unrolled(
    metric: Metric,
    step: Step,
    params: Mapping[str, Tensor] | nn.Module,
    batches: Batches,
    meta: Tree,
    *,
    wrt_params: bool = False,
) -> Result:
    """The metagradient by plain autograd through every step at once: no schedule, no pullback, nothing shared with it.

    Args and returns: those of `metagradient`; `stats` is None.

    Cost: 9 forward passes a step, and the activations of all steps in memory.
    """
    step = as_linear(step)
    # Fresh leaves: the derivative is taken with respect to these values.
    variables = fresh(meta)
    leaves = floating_leaves(variables)
    initial = step.init(params, meta)
    starts = {name: p.detach().requires_grad_(wrt_params) for name, p in initial.params.items()}
    state = initial._replace(params=starts)
    with torch.enable_grad():
        for t in range(len(batches)):
            state = step(state, batches[t], variables)
        phi = value_of(metric, state)
    refuse_missing_derivatives([phi])
    sources = [*leaves, *(starts.values() if wrt_params else [])]
    gradient = list(torch.autograd.grad(phi, sources, allow_unused=True, materialize_grads=True))
    return Result(
        value=phi.detach(),
        meta=with_floating_leaves(meta, gradient[: len(leaves)], keep_others=False),
        params=dict(zip(starts, gradient[len(leaves) :], strict=False)) if wrt_params else None,
        state=detached(state),
        stats=None,
    )


def determinism(step: Step, params: Mapping[str, Tensor] | nn.Module, batches: Batches, meta: Tree) -> None:
    """Check that the step is pure on this run: twice the same bits, and its inputs unchanged.

    Raises:
        ReplayMismatchError: naming the first step and tensor that differ.

    Cost: 2 · len(batches) step evaluations.
    """
    step = as_linear(step)
    state = step.init(params, meta)
    for t in range(len(batches)):
        batch = batches[t]
        given = {"state": state, "batch": batch, "meta": meta}
        copies = independent(given)
        with torch.no_grad():
            first, second = step(state, batch, meta), step(state, batch, meta)
        for name, value in given.items():
            _compare(t, name, value, copies[name], "was changed in place by the step; a step must return new tensors")
        _compare(
            t,
            "state",
            first,
            second,
            "differs between two runs of the same step: a nondeterministic kernel, or a loss or optimizer that "
            "remembers something outside the state",
        )
        _compare(t, "batch", batches[t], batch, "changed between two readings of the same batch")
        state = first


def _phi(metric: Metric, step: Step, state: State, batches: Batches, meta: Tree) -> Tensor:
    with torch.no_grad():
        for t in range(len(batches)):
            state = step(state, batches[t], meta)
    phi = checked_value(metric, state)[0].detach()
    if not bool(torch.isfinite(phi)):
        raise NonFiniteError(f"the metric is {float(phi)} after {state.step} steps.")
    return phi


def _moved(tree: Tree, direction: Tree, distance: float) -> Tree:
    pairs = zip(floating_leaves(tree), floating_leaves(direction), strict=True)
    return with_floating_leaves(tree, [leaf.detach() + distance * toward for leaf, toward in pairs])


def _random_like(tree: Tree, generator: torch.Generator) -> Tree:
    """Standard normal entries in units of each leaf's root mean square."""
    directions = []
    for leaf in floating_leaves(tree):
        size = leaf.detach().square().mean().sqrt()
        normal = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        directions.append(normal * torch.where(size > 0, size, torch.ones_like(size)))
    return with_floating_leaves(tree, directions, keep_others=False)


def _extrapolate(differences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Richardson's table for halved steps: the entry that agrees best with its neighbours, and by how much."""
    best, error = differences[0], torch.full_like(differences[0], torch.inf)
    row = [differences[0]]
    for difference in differences[1:]:
        previous, row = row, [difference]
        for order, coarse in enumerate(previous, start=1):
            refined = row[-1] + (row[-1] - coarse) / (4**order - 1)
            spread = torch.maximum((refined - row[-1]).abs(), (refined - coarse).abs())
            if spread <= error:
                best, error = refined, spread
            row.append(refined)
    return best, error


def _dot(left: Tree, right: Tree) -> Tensor:
    products = [(a * b).sum() for a, b in zip(floating_leaves(left), floating_leaves(right), strict=True)]
    return torch.stack(products).sum() if products else torch.zeros(())


def _compare(step: int, root: str, left: Tree, right: Tree, complaint: str) -> None:
    for name, a, b in zip(names(root, left), tensor_leaves(left), tensor_leaves(right), strict=True):
        if not same_bits(a, b):
            raise ReplayMismatchError(f"at step {step}, {name} {complaint}.")
