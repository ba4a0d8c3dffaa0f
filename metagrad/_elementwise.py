"""Optimizers that treat every entry of the parameters alike: their update and its pullback, block by block.

A block is small enough to stay in a processor's cache through all operations of a rule, and of the many small tensors
of a model one block holds as many as fit; on a GPU blocks are large. What a rule makes on the way is as large as a
block, not as the model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from metagrad import _block
from metagrad._block import After, Block, Entries, Rule, Shares, Values, Wanted
from metagrad._kernels import Kernel, compiled, tensors
from metagrad._reverse import nonzero, pull_gradient
from metagrad._transformation import Given, Made, Transformation, applied_by
from metagrad._tree import floating_leaves, joined, with_floating_leaves
from metagrad._types import Tree

CACHED = 1 << 17  # entries of a block: half a megabyte in float32; docs/log.md has the sizes that were tried
STREAMED = 1 << 24  # on a GPU, where a block is to be worth the time it takes to start its kernels


def elementwise(
    init: Callable[..., Tree], values_at: Callable[[Int[Tensor, ""]], Values], rule: Rule, compile: bool = False
) -> Transformation:
    """The transformation that follows `rule`. Its state is the count, then one tree for each thing remembered.

    Args:
        compile: compute blocks by kernels of torch's compiler.

    Cost: `apply` makes its results and no more; the pullback one tensor for each parameter, and the other cotangents
    over those that it is given.
    """
    formulas = _Elementwise(values_at, rule, compile)
    # Rows are entries like any others.
    own = Transformation(
        init,
        formulas.update,
        formulas.apply,
        formulas.pull,
        lambda: elementwise(init, values_at, rule, compile=True),
        lambda divided: own,
    )
    return own


@dataclass(frozen=True)
class _Elementwise:
    """What a transformation does, but for its `init`."""

    values_at: Callable[[Int[Tensor, ""]], Values]
    rule: Rule
    compile: bool

    def update(self, updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Tree]:
        now, gradient = self._at(state), floating_leaves(updates)
        # A rule without decay needs no parameters.
        columns = [gradient, gradient if params is None else floating_leaves(params), *_memory(state)]
        # Flat, as in blocks: a parameter of shape () would take on the type of a hyperparameter.
        flat = [[leaf.reshape(-1) for leaf in column] for column in columns]
        made = [_block.update(self.rule, now, Block(g, p, m)) for g, p, *m in zip(*flat, strict=True)]
        shaped = [[new.view(g.shape) for new in each] for each, g in zip(made, gradient, strict=True)]
        changes, *memory = map(list, zip(*shaped, strict=True))
        return with_floating_leaves(updates, changes), _with_memory(state, state.step + 1, memory)

    def apply(self, gradient: Tree, state: Tree, params: Tree) -> Made:
        now, columns = self._at(state), [floating_leaves(gradient), floating_leaves(params), *_memory(state)]
        values = [value for value in now.values() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in [*values, *joined(columns)]):
            return applied_by(self.update)(gradient, state, params)
        kernel, numbers = self._prepared(_block.apply, now)
        made = [_like(column) for column in columns[1:]]
        before, after = [list(map(Column, each)) for each in (columns, made)]
        for parts in _blocks(columns[0], self.compile):
            g, p, *memory = (column.read(parts) for column in before)
            new = [column.room(parts) for column in after]
            kernel(self.rule, numbers(g.device), Block(g, p, memory), After(new[0], new[1:]))
            for column, entries in zip(after, new, strict=True):
                column.write(parts, entries)
        return Made(with_floating_leaves(params, made[0]), _with_memory(state, state.step + 1, made[1:]))

    def pull(
        self, given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool
    ) -> tuple[Given, list[Tensor]]:
        now = self._at(given.state)
        asked = {name: value for name, value in now.items() if isinstance(value, Tensor) and value.requires_grad}
        with torch.no_grad():  # The formulas are the derivative; nothing differentiates them.
            back, totals = self._pull(given, cotangent, now, Wanted(wrt_state, bool(asked)))
        # No total where the rule, with what it remembers, does not use the value.
        ends = [totals[name].to(value) if name in totals else torch.zeros_like(value) for name, value in asked.items()]
        # Retained: one value may serve several groups, and several metrics.
        return back, pull_gradient(list(asked.values()), meta, [ends], retain_graph=True)[0]

    def _pull(self, given: Given, cotangent: Made, now: Values, wanted: Wanted) -> tuple[Given, Shares]:
        columns = [floating_leaves(given.gradient), floating_leaves(given.params), *_memory(given.state)]
        to_params, to_memory = floating_leaves(cotangent.params), _memory(cotangent.state)
        # All zeros, as behind the last step where a metric does not read the memory.
        unread = all(leaf is None for leaf in nonzero(joined(to_memory)))
        if wanted.state:
            # Contiguous, since they are written over.
            to_params = [leaf.contiguous() for leaf in to_params]
            to_memory = [[_room(leaf) if unread else leaf.contiguous() for leaf in each] for each in to_memory]
        kernel, numbers = self._prepared(_block.pull, now)
        made = _like(columns[0])
        before, ends, out = [list(map(Column, each)) for each in (columns, [to_params, *to_memory], [made])]
        totals: Shares = {}
        for parts in _blocks(columns[0], self.compile):
            g, p, *memory = (column.read(parts) for column in before)
            if not unread:
                end = [column.read(parts) for column in ends]
            elif wanted.state:
                end = [ends[0].read(parts), *(column.room(parts).zero_() for column in ends[1:])]
            else:
                end = [ends[0].read(parts), *map(torch.zeros_like, memory)]
            to_gradient = out[0].room(parts)
            block = Block(g, p, memory)
            shares = kernel(self.rule, numbers(g.device), block, After(end[0], end[1:]), to_gradient, wanted)
            out[0].write(parts, to_gradient)
            if wanted.state:
                for column, entries in zip(ends, end, strict=True):
                    column.write(parts, entries)
            for name, share in shares.items():
                totals[name] = totals[name] + share if name in totals else share
        back = with_floating_leaves(given.gradient, made)
        if not wanted.state:
            return Given(back, None, None), totals
        state = _with_memory(given.state, given.state.step, to_memory)
        return Given(back, state, with_floating_leaves(given.params, to_params)), totals

    def _at(self, state: Tree) -> Values:
        # In float64: of 0.999 in float32, 1 − βᵗ and its derivative would keep four digits.
        now = {n: v.double() if isinstance(v, Tensor) else v for n, v in self.values_at(state.step).items()}
        return self.rule.at(now, int(state.step))

    def _prepared(self, kernel: Kernel, now: Values) -> tuple[Kernel, Callable[[torch.device], Values]]:
        """How blocks are computed, and the values of `now` as they are then given."""
        if self.compile:
            return compiled(kernel), cache(lambda device: tensors(now, device))
        numbers: Values = {name: float(value) for name, value in now.items()}
        return kernel, lambda device: numbers


def _memory(state: Tree) -> list[list[Tensor]]:
    return [floating_leaves(tree) for tree in state[1:]]


def _with_memory(state: Tree, step: Int[Tensor, ""], memory: Sequence[Sequence[Tensor]]) -> Tree:
    trees = [with_floating_leaves(tree, new) for tree, new in zip(state[1:], memory, strict=True)]
    return type(state)(step, *trees)


def _room(leaf: Tensor) -> Tensor:
    """A tensor whose content nobody reads, to be written over: this one, unless it is one number for many entries."""
    return leaf if leaf.is_contiguous() else _like([leaf])[0]


def _like(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]


class Part(NamedTuple):
    """Entries of one tensor."""

    leaf: int
    start: int
    stop: int


class Column:
    """A list of tensors, one for each parameter, as blocks of entries; contiguous where they are written to."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._flat = [leaf.reshape(-1) for leaf in leaves]

    def read(self, parts: Sequence[Part]) -> Entries:
        """The entries of a block: themselves where they are of one tensor, otherwise a copy."""
        pieces = self._pieces(parts)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def room(self, parts: Sequence[Part]) -> Entries:
        """Room for them, as `read` but for what is there now."""
        if len(parts) == 1:
            return self._pieces(parts)[0]
        return self._flat[parts[0].leaf].new_empty(sum(part.stop - part.start for part in parts))

    def write(self, parts: Sequence[Part], entries: Entries) -> None:
        """Put the entries of a block, which were changed, back where they belong."""
        if len(parts) > 1:
            for piece, own in zip(self._pieces(parts), entries.split([p.stop - p.start for p in parts]), strict=True):
                piece.copy_(own)

    def _pieces(self, parts: Sequence[Part]) -> list[Entries]:
        return [self._flat[part.leaf][part.start : part.stop] for part in parts]


def _blocks(leaves: Sequence[Tensor], whole: bool) -> Iterator[tuple[Part, ...]]:
    """Blocks of entries of one kind of numbers on one device; with `whole` large tensors are not cut."""
    kinds = [(leaf.dtype, leaf.device) for leaf in leaves]
    for kind in dict.fromkeys(kinds):
        sizes = tuple(leaf.numel() if own == kind else 0 for leaf, own in zip(leaves, kinds, strict=True))
        yield from _parts(sizes, CACHED if kind[1].type == "cpu" else STREAMED, whole)


@lru_cache(maxsize=64)
def _parts(sizes: tuple[int, ...], most: int, whole: bool) -> list[tuple[Part, ...]]:
    """All entries of tensors of these sizes, in blocks: parts of one large tensor, or several small tensors."""
    blocks: list[tuple[Part, ...]] = []
    small: list[Part] = []
    room = most
    for leaf, size in enumerate(sizes):
        if size >= min(most // 8, CACHED):
            largest = size if whole else most
            blocks += [(Part(leaf, start, min(start + largest, size)),) for start in range(0, size, largest)]
        elif size:
            if size > room:
                blocks.append(tuple(small))
                small, room = [], most
            small.append(Part(leaf, 0, size))
            room -= size
    return [*blocks, tuple(small)] if small else blocks
