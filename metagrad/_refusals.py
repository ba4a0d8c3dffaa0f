"""What a step refuses, because the answer would be a wrong number without a word."""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import optree
import torch
from torch import Tensor
from torch.autograd.graph import Node

from metagrad._tree import describe, names, not_finite, tensor_leaves
from metagrad._types import Batches, NonFiniteError, Params, Tree


@runtime_checkable
class Subscriptable(Protocol):
    """Anything with [t]."""

    def __getitem__(self, step: int, /) -> Tree:
        """The entry at `step`."""
        ...


def refuse_shared_modules(module: torch.nn.Module) -> None:
    """Raise for a submodule with two names: torch.func.functional_call would leave changed parameters in it."""
    first: dict[torch.nn.Module, str] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        holds_state = next(child.parameters(), None) is not None or next(child.buffers(), None) is not None
        if child in first and holds_state:
            raise ValueError(
                f"the submodules {first[child]!r} and {name!r} are one object, which torch.func.functional_call cannot "
                "handle. Share its parameters instead (b.weight = a.weight), or call one module twice."
            )
        first.setdefault(child, name)


def refuse_non_finite_gradient(params: Params, gradient: Sequence[Tensor], step: int) -> None:
    """Raise for a NaN or an infinity in a training gradient, naming the step and the parameters."""
    if wrong := not_finite("params", params, gradient):
        raise NonFiniteError(
            f"the training gradient is not finite at step {step} in {', '.join(wrong)}, though the loss is. A square "
            "root or a norm at 0 inside the loss does this; so does a learning rate that is too high."
        )


def refuse_changed_shapes(before: Params, after: Params) -> None:
    """Raise if an update gave a parameter another shape or type: a hyperparameter was broadcast over it."""
    for name, old in before.items():
        new = after[name]
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"the optimizer turned parameter {name!r} from {describe(old)} into {describe(new)}. Give every "
                "hyperparameter as a number or a tensor of shape ()."
            )


def refuse_other_structure(what: str, given: Tree, expected: Tree) -> None:
    """Raise unless two trees have the same structure, and tensors of the same shapes and types at the same places."""
    if optree.tree_structure(given) != optree.tree_structure(expected):
        lacks, adds = (sorted(set(names("", a)) - set(names("", b))) for a, b in ((expected, given), (given, expected)))
        raise ValueError(
            f"{what} has another structure than expected: it lacks {', '.join(lacks) or 'nothing'}, and adds "
            f"{', '.join(adds) or 'nothing'} (or differs in a value that is no tensor)."
        )
    for name, left, right in zip(names(what, expected), tensor_leaves(given), tensor_leaves(expected), strict=True):
        if left.shape != right.shape or left.dtype != right.dtype:
            raise ValueError(f"{name} is {describe(left)}, where {describe(right)} was expected.")


def refuse_unreadable(batches: Batches) -> None:
    """Raise unless `batches` has a length above 0 and can be read several times."""
    if not isinstance(batches, Sized):
        raise ValueError(
            f"`batches` is a {type(batches).__name__}, which can be read once. Pass a list, or anything with len() "
            "and [t] that gives the same batch at every reading."
        )
    if not isinstance(batches, Subscriptable):
        raise ValueError(
            f"`batches` is a {type(batches).__name__}, which cannot be read at [t]. Pass a list, for instance "
            "list(loader)."
        )
    if len(batches) == 0:
        raise ValueError("`batches` is empty: there is no step to train. Pass at least one batch.")


@contextmanager
def refuse_changes_in_place(who: str, **given: Tree) -> Iterator[None]:
    """Raise if a tensor of what was `given` is changed inside: kept states share it, and would be others."""
    before = {root: [leaf._version for leaf in _tracked(tree)] for root, tree in given.items()}
    yield
    for root, tree in given.items():
        for name, leaf, version in zip(names(root, tree), _tracked(tree), before[root], strict=False):
            if leaf._version != version:
                raise ValueError(f"{who} changed {name} in place. Make a new tensor instead: x + 1, not x.add_(1).")


def _tracked(tree: Tree) -> list[Tensor]:
    # Tensors made under torch.inference_mode count no changes.
    return [leaf for leaf in tensor_leaves(tree) if not leaf.is_inference()]


def refuse_unknown_leaves(what: str, tree: Tree) -> None:
    """Raise for containers that optree does not open, and complex tensors: both would be taken as constants."""
    for accessor, leaf in zip(*optree.tree_flatten_with_accessor(tree)[:2], strict=True):
        known = not leaf.is_complex() if isinstance(leaf, Tensor) else isinstance(leaf, int | float | str)
        if not known:
            raise ValueError(
                f"{accessor.codify(what)} is {describe(leaf)}, which would be taken as a constant. Use real tensors in "
                "dicts, lists, tuples and named tuples, for instance dict(...)."
            )


class MissingDerivativeError(RuntimeError):
    """A second derivative is needed of what has only one."""


def refuse_missing_derivatives(outputs: Sequence[Tensor]) -> None:
    """Raise if `outputs` went through a function that cannot be differentiated again.

    torch leaves the result of a backward marked @once_differentiable without a path to its inputs, and a missing path
    would be taken as a zero.
    """
    if any(node.name() == "torch::autograd::Error" for node in graph_of(outputs)):
        raise MissingDerivativeError(
            "the loss uses a function marked @once_differentiable, and a second derivative is needed. Write its "
            "backward in differentiable operations, or replace the function."
        )


def graph_of(outputs: Sequence[Tensor]) -> set[Node]:
    """What autograd would go through from `outputs`."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen
