"""What every referee does: run a step, measure Φ, and move along a direction."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metagrad._custom import as_linear
from metagrad._metric import checked_value
from metagrad._tree import describe, floating_leaves, with_floating_leaves
from metagrad._types import Batches, LinearStep, Metric, NonFiniteError, Scalar, State, Step, Tree


def begin(
    step: Step, params: Mapping[str, Tensor] | nn.Module | State, batches: Batches, meta: Tree
) -> tuple[LinearStep, State]:
    """The step as it is to be run, and the state before step 0, once the inputs are known to work together.

    Raises:
        ValueError: as `metagradient` does before training.
    """
    linear = as_linear(step)
    linear.validate(batches, meta)
    return linear, linear.init(params, meta)


def trained(step: Step, state: State, batches: Batches, meta: Tree, num_steps: int | None = None) -> State:
    """The state after all steps, or the first `num_steps`, without a graph."""
    with torch.no_grad():
        for t in range(len(batches) if num_steps is None else num_steps):
            state = step(state, batches[t], meta)
    return state


def measured(metric: Metric, state: State) -> Scalar:
    """Φ = metric(state), as float64 and without a graph.

    Raises:
        ValueError: if it is not something that `metagradient` could differentiate.
        NonFiniteError: if Φ is NaN or infinite.
    """
    phi = checked_value(metric, state)[0].detach()
    if not bool(torch.isfinite(phi)):
        raise NonFiniteError(f"the metric is {float(phi)} after {state.step} steps.")
    return phi.double().cpu()


def one_metric(metric: Metric, checker: str) -> None:
    """Raise a ValueError unless `metric` is one function."""
    if isinstance(metric, list | tuple):
        raise ValueError(
            f"`metric` is a list of {len(metric)}. Check one metric at a time: mg.check.{checker} takes one."
        )
    if not callable(metric):
        raise ValueError(f"`metric` is {describe(metric)}. Pass one function of the trained state.")


def precision_of(tree: Tree) -> float:
    """The coarsest relative spacing among the floating-point tensors of `tree`."""
    return max(torch.finfo(leaf.dtype).eps for leaf in floating_leaves(tree))


def moved(tree: Tree, direction: Tree, distance: float) -> Tree:
    """`tree` + distance · `direction`, detached."""
    pairs = zip(floating_leaves(tree), floating_leaves(direction), strict=True)
    return with_floating_leaves(tree, [leaf.detach() + distance * toward for leaf, toward in pairs])


def random_like(tree: Tree, generator: torch.Generator) -> Tree:
    """Standard normal entries in units of each leaf's root mean square (1 for a leaf of zeros)."""
    directions = [normal_like(leaf, generator) * unit(leaf) for leaf in floating_leaves(tree)]
    return with_floating_leaves(tree, directions, keep_others=False)


def normal_like(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal entries."""
    return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)


def unit(leaf: Tensor) -> Tensor:
    """The root mean square of a tensor, or 1 where that is 0."""
    size = leaf.detach().square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


def dot(left: Tree, right: Tree) -> Scalar:
    """The sum of products of two trees, in float64."""
    pairs = zip(floating_leaves(left), floating_leaves(right), strict=True)
    products = [(a.detach().double() * b.detach().double()).sum().cpu() for a, b in pairs]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)
