"""Optimizers that treat every entry of the parameters alike: their update and its pullback, block by block.

A block is small enough to stay in a processor's cache through all operations of a rule, and of the many small tensors
of a model one block holds as many as fit. What a rule makes on the way is as large as a block, not as the model.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from metagrad import _block
from metagrad._block import After, Block, Entries, Rule, Values, Wanted
from metagrad._kernels import compiled, tensors
from metagrad._reverse import nonzero, pull_gradient
from metagrad._transformation import Given, Made, Transformation, applied_by
from metagrad._tree import floating_leaves, joined, with_floating_leaves
from metagrad._types import Tree

BLOCK = 1 << 17  # entries: half a megabyte in float32; docs/log.md has the sizes that were tried
LARGEST = 1 << 62  # of a compiled block, which is read once


def elementwise(
    init: Callable[..., Tree], values_at: Callable[[Int[Tensor, ""]], Values], rule: Rule, compile: bool = False
) -> Transformation:
    """The transformation that follows `rule`. Its state is the count, then one tree for each thing remembered.

    Args:
        compile: compute blocks by kernels of torch's compiler.

    Cost: `apply` makes its results and no more; the pullback one tensor for each parameter, and the other cotangents
    over those that it is given.
    """
    apply_block = compiled(_block.apply) if compile else _block.apply
    pull_block = compiled(_block.pull) if compile else _block.pull

    def at(state: Tree) -> Values:
        return rule.at(values_at(state.step), int(state.step))

    def numbers(now: Values, device: torch.device) -> Values:
        return tensors(now, device) if compile else {name: float(value) for name, value in now.items()}

    def update(updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Tree]:
        now, gradient = at(state), floating_leaves(updates)
        # A rule without decay needs no parameters.
        columns = [gradient, gradient if params is None else floating_leaves(params), *_memory(state)]
        made = [_block.update(rule, now, Block(g, p, m)) for g, p, *m in zip(*columns, strict=True)]
        changes, *memory = map(list, zip(*made, strict=True))
        return with_floating_leaves(updates, changes), _with_memory(state, state.step + 1, memory)

    def apply(gradient: Tree, state: Tree, params: Tree) -> Made:
        now, columns = at(state), [floating_leaves(gradient), floating_leaves(params), *_memory(state)]
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in [*joined(columns), *_tensors(now)]):
            return applied_by(update)(gradient, state, params)
        made = [_like(column) for column in columns[1:]]
        before, after = [list(map(Column, each)) for each in (columns, made)]
        for parts in _blocks(columns[0], compile):
            g, p, *memory = (column.read(parts) for column in before)
            new = [column.room(parts) for column in after]
            apply_block(rule, numbers(now, g.device), Block(g, p, memory), After(new[0], new[1:]))
            for column, entries in zip(after, new, strict=True):
                column.write(parts, entries)
        return Made(with_floating_leaves(params, made[0]), _with_memory(state, state.step + 1, made[1:]))

    def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
        now = at(given.state)
        wanted = {name: value for name, value in now.items() if isinstance(value, Tensor) and value.requires_grad}
        with torch.no_grad():
            back, totals = pull_all(now, given, cotangent, Wanted(wrt_state, bool(wanted)))
        # No total where the rule, with what it remembers, does not use the value.
        ends = [totals[name].to(value) if name in totals else torch.zeros_like(value) for name, value in wanted.items()]
        # Retained: one value may serve several groups, and several metrics.
        return back, pull_gradient(list(wanted.values()), meta, [ends], retain_graph=True)[0]

    def pull_all(now: Values, given: Given, cotangent: Made, wanted: Wanted) -> tuple[Given, dict[str, Tensor]]:
        columns = [floating_leaves(given.gradient), floating_leaves(given.params), *_memory(given.state)]
        ends = [floating_leaves(cotangent.params), *_memory(cotangent.state)]
        # Before the last step nothing reads the memory.
        unread = all(leaf is None for leaf in nonzero(joined(ends[1:])))
        if wanted.state:
            ends = [ends[0], *map(_like, ends[1:])] if unread else ends
            ends = [[leaf.contiguous() for leaf in each] for each in ends]
        made = _like(columns[0])
        before, (ends_params, *ends_memory), out = list(map(Column, columns)), list(map(Column, ends)), Column(made)
        totals: dict[str, Tensor] = {}
        for parts in _blocks(columns[0], compile):
            g, p, *memory = (column.read(parts) for column in before)
            if not unread:
                to_memory = [column.read(parts) for column in ends_memory]
            elif wanted.state:
                to_memory = [column.room(parts).zero_() for column in ends_memory]
            else:
                to_memory = [torch.zeros_like(g) for _ in memory]
            end, to_gradient = After(ends_params.read(parts), to_memory), out.room(parts)
            shares = pull_block(rule, numbers(now, g.device), Block(g, p, memory), end, to_gradient, wanted)
            out.write(parts, to_gradient)
            if wanted.state:
                for column, entries in zip([ends_params, *ends_memory], [end.params, *end.memory], strict=True):
                    column.write(parts, entries)
            for name, share in shares.items():
                totals[name] = totals[name] + share if name in totals else share
        back = with_floating_leaves(given.gradient, made)
        if not wanted.state:
            return Given(back, None, None), totals
        state = _with_memory(given.state, given.state.step, ends[1:])
        return Given(back, state, with_floating_leaves(given.params, ends[0])), totals

    return Transformation(init, update, apply, pull, lambda: elementwise(init, values_at, rule, compile=True))


def _memory(state: Tree) -> list[list[Tensor]]:
    return [floating_leaves(tree) for tree in state[1:]]


def _with_memory(state: Tree, step: Int[Tensor, ""], memory: Sequence[Sequence[Tensor]]) -> Tree:
    trees = [with_floating_leaves(tree, new) for tree, new in zip(state[1:], memory, strict=True)]
    return type(state)(step, *trees)


def _tensors(now: Values) -> list[Tensor]:
    return [value for value in now.values() if isinstance(value, Tensor)]


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
        yield from _parts(sizes, LARGEST if whole else BLOCK)


@lru_cache(maxsize=64)
def _parts(sizes: tuple[int, ...], largest: int) -> list[tuple[Part, ...]]:
    """All entries of tensors of these sizes, in blocks: parts of one large tensor, or several small tensors."""
    blocks: list[tuple[Part, ...]] = []
    small: list[Part] = []
    room = BLOCK
    for leaf, size in enumerate(sizes):
        if size >= BLOCK // 2:
            blocks += [(Part(leaf, start, min(start + largest, size)),) for start in range(0, size, largest)]
        elif size:
            if size > room:
                blocks.append(tuple(small))
                small, room = [], BLOCK
            small.append(Part(leaf, 0, size))
            room -= size
    return [*blocks, tuple(small)] if small else blocks
