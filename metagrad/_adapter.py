"""TorchOpt's own transformations, taken in only after each has proved that it is pure and differentiable.

Some of TorchOpt 0.7.3 are neither, and would give a wrong gradient without a word (docs/log.md has the measurements).
"""

import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torchopt.base import ChainedGradientTransformation, GradientTransformation

from metagrad._transformation import Transformation, chained
from metagrad._tree import (
    describe,
    floating_leaves,
    fresh,
    independent,
    map_tensors,
    names,
    same_bits,
    tensor_leaves,
    with_floating_leaves,
)
from metagrad._types import Tree

SCALES = (1e-3, 1e6)  # of the trial gradients: below and above every usual threshold and epsilon
NUM_STEPS = 6  # RAdam divides by its running mean from its sixth step on.
SIZE = 32  # of the part of a parameter that is tried, along every axis: a model may be large
STEP_SIZE = 1e-7  # of the differences, in units of the numbers themselves
TOLERANCE = 1e-6  # far above rounding, 1e-16 / STEP_SIZE, and the share of entries that a step carries over a kink
INSTEAD = "Use mg.optim.sgd, adam, adamw, muon or clip, or keep everything in the state and in the graph."


def adapt(transformation: GradientTransformation) -> Transformation:
    """`transformation`, which must prove itself when it meets the parameters; `TrainStep` adapts what it is given.

    At `init` it is tried on random gradients. It must be *pure* (an update repeated gives the same bits and changes no
    input) and *differentiable* (autograd's derivative with respect to gradient, state and parameters is that of
    central differences, in float64). Its updates are never made in place. Ours are returned as they are.

    Raises:
        ValueError: at once, for what is no transformation; at `init`, naming the property that fails and by how much.

    Warns:
        UserWarning: at `init`, if the derivative is not finite where a gradient is exactly 0.

    Cost: 36 updates at `init`, most of them in float64, of the first 32 entries along every axis of each parameter (of
    all, if it can only work on all); none later. Random numbers come from a generator of its own.

    >>> import metagrad as mg, torch, torchopt
    >>> params = {"w": torch.ones(3)}
    >>> state = mg.optim.adapt(torchopt.adam(1e-3, eps_root=1e-8)).init(params)
    >>> mg.optim.adapt(torchopt.clip_grad_norm(1.0)).init(params)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: the optimizer is not differentiable: ...
    """
    if isinstance(transformation, Transformation):
        return transformation
    if isinstance(transformation, ChainedGradientTransformation):
        # Each on its own: the error then is about one, and ours need no proof.
        return chained(*(adapt(link) for link in transformation.transformations))
    if not isinstance(transformation, GradientTransformation):
        raise ValueError(
            f"the optimizer is {describe(transformation)}. Pass a TorchOpt transformation such as "
            "mg.optim.adamw(lr=1e-3); torch.optim cannot be differentiated."
        )

    def update(updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Tree]:
        result: tuple[Tree, Tree] = transformation.update(updates, state, params=params, inplace=False)
        return result

    def init(params: Tree) -> Tree:
        trial = Transformation(transformation.init, update)
        try:
            _prove(trial, map_tensors(_corner, params))
        except RuntimeError:  # It holds tensors of the parameters' own shapes, so nothing less will do.
            _prove(trial, independent(params))
        return transformation.init(params)

    return Transformation(init, update)


class Inputs(NamedTuple):
    """Everything that an update reads."""

    gradient: Tree
    state: Tree
    params: Tree


class Outputs(NamedTuple):
    """Everything that an update makes."""

    updates: Tree
    state: Tree


def _prove(trial: Transformation, params: Tree) -> None:
    _refuse_impure(trial, params)
    _refuse_wrong_derivative(trial, map_tensors(_exact, params))


def _run(trial: Transformation, inputs: Inputs) -> Outputs:
    return Outputs(*trial.update(inputs.gradient, inputs.state, params=inputs.params))


def _refuse_impure(trial: Transformation, params: Tree) -> None:
    normal = _normal()
    initial = trial.init(params)
    # Not reached by updates: TorchOpt's momentum treats the first call ever in another way, and from a velocity of 0
    # that makes no difference. Positive, for second moments are.
    later = with_floating_leaves(initial, [normal(leaf).abs() for leaf in floating_leaves(initial)])
    gradient = map_tensors(normal, params)
    trials = [Inputs(gradient, state, params) for state in (later, initial)]
    before = independent(trials)
    with torch.no_grad():
        first = independent([_run(trial, inputs) for inputs in trials])
        again = [_run(trial, inputs) for inputs in trials]
    if changed := _differences(before, trials):
        raise ValueError(f"the optimizer is not pure: its update changes {changed[0][0]} in place. {INSTEAD}")
    if differing := _differences(first, again):
        place, gap = max(differing, key=itemgetter(1))
        raise ValueError(
            f"the optimizer is not pure: the same update made twice differs by {100 * gap:.3g} % in {place}. It "
            "remembers something outside its state, as the momentum of TorchOpt 0.7.3 does, or draws random numbers. "
            f"{INSTEAD}"
        )


def _differences(left: Sequence[Tree], right: Sequence[Tree]) -> list[tuple[str, float]]:
    """Where two lists of inputs or outputs differ in any bit, and by what share of the left one."""
    found = []
    for one, other in zip(left, right, strict=True):
        for place, a, b in zip(names("", one), tensor_leaves(one), tensor_leaves(other), strict=True):
            if not same_bits(a, b):
                gap = torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(a.double())
                found.append((place.lstrip("."), float(gap)))
    return found


def _refuse_wrong_derivative(trial: Transformation, params: Tree) -> None:
    normal = _normal()
    for scale in SCALES:

        def draw(leaf: Tensor, scale: float = scale) -> Tensor:
            return scale * normal(leaf)

        for inputs in _start_and_later(trial, params, draw):
            error = _derivative_error(trial, inputs, normal)
            if not error <= TOLERANCE:
                raise ValueError(
                    "the optimizer is not differentiable: its derivative by autograd differs from central differences "
                    f"by {100 * error:.3g} % at gradients of size {scale:.0e}. A part of it is outside the graph, as "
                    f"in TorchOpt's clip_grad_norm and use_accelerated_op=True. {INSTEAD}"
                )
    for inputs in _start_and_later(trial, params, torch.zeros_like):
        leaves, outputs = _with_graph(trial, inputs)
        pulled = _pull(outputs, [torch.ones_like(output) for output in outputs], leaves)
        if not all(bool(torch.isfinite(gradient).all()) for gradient in pulled):
            warnings.warn(
                "the derivative of the optimizer is not finite where a gradient entry is exactly 0 (an unused "
                "embedding row is enough); a metagradient that meets one stops with a NonFiniteError. For TorchOpt's "
                "Adam pass eps_root=1e-8, or use mg.optim.adam: see docs/stability.md.",
                stacklevel=2,
            )
            return


def _start_and_later(trial: Transformation, params: Tree, draw: Callable[[Tensor], Tensor]) -> list[Inputs]:
    """An update at the initial state and one after some steps, at gradients made by `draw`."""
    initial = state = trial.init(params)
    with torch.no_grad():
        for _ in range(NUM_STEPS):
            state = _run(trial, Inputs(map_tensors(draw, params), state, params)).state
    return [Inputs(map_tensors(draw, params), at, params) for at in (initial, state)]


def _derivative_error(trial: Transformation, inputs: Inputs, normal: Callable[[Tensor], Tensor]) -> float:
    """How far autograd is from central differences along one direction, relative to the size of what is added up.

    The direction is nearly along the inputs themselves, and the cotangent along the outputs: what is missing from a
    norm, say, shows there in full, and to a random direction hardly at all.
    """

    def near(leaf: Tensor) -> Tensor:
        return leaf.detach() * (1 + 0.5 * normal(leaf))

    leaves, outputs = _with_graph(trial, inputs)
    directions = [near(leaf) for leaf in leaves]
    # Relative to each output's size, so that none is lost beside a larger one.
    sizes = [output.detach().square().sum().clamp(min=torch.finfo(output.dtype).tiny) for output in outputs]
    cotangents = [near(output) / size / len(outputs) for output, size in zip(outputs, sizes, strict=True)]
    pulled = _pull(outputs, cotangents, leaves)
    terms = [float((p * d).sum()) for p, d in zip(pulled, directions, strict=True)]

    def moved(distance: float) -> list[Tensor]:
        values = [leaf.detach() + distance * d for leaf, d in zip(leaves, directions, strict=True)]
        with torch.no_grad():
            return floating_leaves(_run(trial, with_floating_leaves(inputs, values)))

    pairs = zip(moved(STEP_SIZE), moved(-STEP_SIZE), cotangents, strict=True)
    difference = sum(float(((up - down) * c).sum()) for up, down, c in pairs) / (2 * STEP_SIZE)
    # The outputs count as 1 in all: what is far below that is rounding.
    return abs(sum(terms) - difference) / max(sum(map(abs, terms)), abs(difference), 1e-4)


def _with_graph(trial: Transformation, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors of fresh inputs, and of the outputs that they give."""
    variables = fresh(inputs)
    with torch.enable_grad():
        return floating_leaves(variables), floating_leaves(_run(trial, variables))


def _pull(outputs: list[Tensor], cotangents: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    pairs = [(output, c) for output, c in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    kept, wanted = map(list, zip(*pairs, strict=True))
    return list(torch.autograd.grad(kept, leaves, wanted, allow_unused=True, materialize_grads=True))


def _normal() -> Callable[[Tensor], Tensor]:
    """Standard normal tensors like a given one, the same at every proof."""
    generator = torch.Generator().manual_seed(0)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _corner(tensor: Tensor) -> Tensor:
    # Cloned: what writes in place is refused, and must not have reached the parameters.
    return tensor.detach()[(slice(SIZE),) * tensor.ndim].clone()


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
