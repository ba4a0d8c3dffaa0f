"""Whether a step is a pure function on this run: the same bits twice, and its inputs unchanged."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from metagrad._tree import describe, independent, same_bits, tensor_leaves
from metagrad._types import Batches, ReplayMismatchError, State, Step, Tree
from metagrad.check._runs import begin

IN_PLACE = "was changed in place by the step; a step must return new tensors"
TWO_RUNS = (
    "differs between two runs of the same step: a nondeterministic kernel, or a loss or optimizer that remembers "
    "something outside the state"
)
TWO_READINGS = (
    "changed between two readings of the same batch: drawn anew each time (shuffling, augmentation)? Make "
    "`batches[t]` a function of t alone"
)


class Determinism(NamedTuple):
    """What was run twice and found equal bit for bit.

    Attributes:
        num_steps: steps of the run.
        num_tensors: tensors of the state, compared after every step.
    """

    num_steps: int
    num_tensors: int

    def __str__(self) -> str:
        return (
            f"Verdict: deterministic: each of {self.num_steps} steps, run twice, gave the same bits in all "
            f"{self.num_tensors} tensors of the state, and changed nothing that it was given."
        )


def determinism(
    step: Step, params: Mapping[str, Tensor] | nn.Module | State, batches: Batches, meta: Tree
) -> Determinism:
    """Check that the step is pure on this run: twice the same bits, and its inputs unchanged.

    Args: those of `metagradient`.

    Returns:
        What was compared; whatever differs raises.

    Raises:
        ReplayMismatchError: naming the first step and tensor that differ, and the likely cause.
        ValueError: as `metagradient` does before training.

    Cost: 2 · len(batches) step evaluations.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(lambda p, b, meta: (p["w"] - b) ** 2, mg.optim.sgd(lr=0.1))
        >>> print(mg.check.determinism(step, {"w": torch.tensor(0.0)}, [torch.ones(1)] * 2, {}))
        Verdict: deterministic: each of 2 steps, run twice, gave the same bits in all 3 tensors of the state, and \
changed nothing that it was given.
    """
    running, state = begin(step, params, batches, meta)
    for t in range(len(batches)):
        batch = batches[t]
        given = {"state": state, "batch": batch, "meta": meta}
        copies = independent(given)
        with torch.no_grad():
            first, second = running(state, batch, meta), running(state, batch, meta)
        for name, value in given.items():
            _compare(t, name, value, copies[name], IN_PLACE)
        _compare(t, "state", first, second, TWO_RUNS)
        _compare(t, "batch", batches[t], batch, TWO_READINGS)
        state = first
    return Determinism(len(batches), len(tensor_leaves(state)))


def _compare(step: int, root: str, left: Tree, right: Tree, complaint: str) -> None:
    """Raise at the first place where two trees differ: in structure, then in a number."""
    lefts, rights = _leaves(root, left), _leaves(root, right)
    if only := [name for name in [*lefts, *rights] if name not in lefts or name not in rights]:
        raise ReplayMismatchError(f"at step {step}, {only[0]}, which one of two trees lacks, {complaint}.")
    for name, leaf in lefts.items():
        if not _same(leaf, rights[name]):
            raise ReplayMismatchError(f"at step {step}, {name} {complaint} ({_gap(leaf, rights[name])}).")
    if optree.tree_structure(left) != optree.tree_structure(right):
        raise ReplayMismatchError(
            f"at step {step}, the structure of {root} {complaint} ({describe(left)}, {describe(right)})."
        )


def _leaves(root: str, tree: Tree) -> dict[str, Any]:
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return {accessor.codify(root): leaf for accessor, leaf in zip(accessors, leaves, strict=True)}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return same_bits(left, right)
    if isinstance(left, int | float | str) and isinstance(right, int | float | str):
        return repr(left) == repr(right)  # As written: a NaN equals itself, and 1 does not equal 1.0.
    return type(left) is type(right)  # Other objects are the user's, and constants.


def _gap(left: Any, right: Any) -> str:
    """How far apart two leaves are, in words."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return f"{left!r} and {right!r}"
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{describe(left)} and {describe(right)}"
    return f"by up to {float((left.detach().double() - right.detach().double()).abs().max()):.0e}"
