"""Trees of tensors, seen as the flat list of their floating-point leaves."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from metagrad._types import Params, State, Tree


def tensor_leaves(tree: Tree) -> list[Tensor]:
    """The tensors of `tree`, in a fixed order."""
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def floating_leaves(tree: Tree) -> list[Tensor]:
    """The tensors of `tree` that can carry a gradient, in a fixed order."""
    return [leaf for leaf in tensor_leaves(tree) if leaf.is_floating_point()]


def names(root: str, tree: Tree) -> list[str]:
    """Where each of `tensor_leaves(tree)` is, as one would write it: `root['weights']`."""
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return [a.codify(root) for a, leaf in zip(accessors, leaves, strict=True) if isinstance(leaf, Tensor)]


def with_floating_leaves(tree: Tree, values: Iterable[Tensor | None], *, keep_others: bool = True) -> Tree:
    """`tree` with its floating-point leaves replaced by `values`; the other leaves kept, or made None."""
    replacement = iter(values)
    return optree.tree_map(
        lambda leaf: (
            next(replacement)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else (leaf if keep_others else None)
        ),
        tree,
    )


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """`tree` with `function` applied to every tensor."""
    return optree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def detached(tree: Tree) -> Tree:
    """`tree` without its graph, sharing its storage."""
    return map_tensors(Tensor.detach, tree)


def fresh(tree: Tree) -> Tree:
    """`tree` with floating-point leaves cut from any graph and ready to be differentiated."""
    return with_floating_leaves(tree, [leaf.detach().requires_grad_() for leaf in floating_leaves(tree)])


def grouped(values: Sequence[Tensor], groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """`values` cut into lists as long as `groups`."""
    remaining = iter(values)
    return [list(islice(remaining, len(group))) for group in groups]


def joined(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The inverse of `grouped`."""
    return [value for group in groups for value in group]


def add(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """The sum, tensor by tensor."""
    return [a + b for a, b in zip(left, right, strict=True)]


def separate(leaves: Sequence[Tensor]) -> list[Tensor]:
    """`leaves`, copied where one shares memory with an earlier one or with itself: each may be written over."""
    taken: set[int] = set()
    own = []
    for leaf in leaves:
        # By storage: two views may overlap without beginning at the same byte.
        shared = leaf.untyped_storage().data_ptr() in taken or not leaf.is_contiguous()
        own.append(leaf.clone(memory_format=torch.contiguous_format) if shared else leaf)
        taken.add(leaf.untyped_storage().data_ptr())
    return own


def independent(tree: Tree) -> Tree:
    """A copy that shares neither storage nor graph with `tree`, so that nobody can change it later."""
    return map_tensors(lambda leaf: leaf.detach().clone(), tree)


class Differentiable(NamedTuple):
    """The part of a state that carries a cotangent."""

    params: Params
    optimizer: Tree
    buffers: Params


def differentiable(state: State) -> Differentiable:
    """The parameters, then the optimizer state, then the buffers."""
    return Differentiable(state.params, state.optimizer, state.buffers)


def num_bytes(tree: Tree) -> int:
    """Bytes of all tensors of `tree`."""
    return sum(leaf.nbytes for leaf in tensor_leaves(tree))


def not_finite(root: str, tree: Tree, values: Iterable[Tensor]) -> list[str]:
    """Where `values`, one for each floating-point leaf of `tree`, hold a NaN or an infinity."""
    leaves = zip(names(root, tree), tensor_leaves(tree), strict=True)
    named = dict(zip((name for name, leaf in leaves if leaf.is_floating_point()), values, strict=True))
    # A sum is one reading, and finite only if all entries are. It may overflow where none does: then each is seen.
    sums = [value.detach().sum().float() for value in named.values()]
    if not sums or bool(torch.stack([each.to(sums[0].device) for each in sums]).isfinite().all()):
        return []
    return [name for name, value in named.items() if not bool(torch.isfinite(value).all())]


def describe(value: Tree) -> str:
    """What a user passed, in a few words: keys and shapes rather than numbers."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}".replace("torch.", "")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {describe(entry)}" for key, entry in value.items()) + "}"
    return f"a {type(value).__name__}"


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: a NaN equals itself, and 0.0 does not equal -0.0."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    # Cloned: torch reads memory as other integers only where it is contiguous, be it of one element.
    flat = (t.detach().reshape(-1).clone(memory_format=torch.contiguous_format) for t in (left, right))
    return torch.equal(*(t.view(torch.uint8) for t in flat))
