"""Optimizers that treat every entry of the parameters alike: their update and its pullback, block by block.

A block is small enough to stay in a processor's cache through all operations of a rule, and of the many small tensors
of a model one block holds as many as fit. What a rule makes on the way is as large as a block, not as the model.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from metagrad._block import Block, Entries, Rule, Values, Wanted
from metagrad._compiled_rule import CompiledRule
from metagrad._reverse import nonzero, pull_gradient
from metagrad._transformation import Given, Made, Transformation
from metagrad._tree import floating_leaves, grouped, joined, with_floating_leaves
from metagrad._types import Tree

BLOCK = 1 << 17  # entries: half a megabyte in float32; docs/log.md has the sizes that were tried


def elementwise(
    init: Callable[..., Tree], values_at: Callable[[Int[Tensor, ""]], Values], rule: Rule
) -> Transformation:
    """The transformation that follows `rule`. Its state is the count, then one tree for each thing remembered.

    Cost: `update` makes its results and no more; the pullback one tensor for each parameter, and overwrites the
    cotangents of the state.
    """

    def update(updates: Tree, state: Tree, *, params: Tree = None, inplace: bool = False) -> Made:
        now = values_at(state.step)
        at = rule.at(now, int(state.step))
        gradient, memory = floating_leaves(updates), [floating_leaves(tree) for tree in state[1:]]
        # A rule without decay needs no parameters.
        leaves = [gradient, gradient if params is None else floating_leaves(params), *memory]
        values = [value for value in now.values() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in [*values, *sum(leaves, [])]):
            whole = [rule.update(at, Block(g, p, m)) for g, p, *m in zip(*leaves, strict=True)]
            made = [[change, *new] for change, new in whole]
            columns = [list(column) for column in zip(*made, strict=True)]
        else:
            columns = [_like(gradient) for _ in range(1 + len(memory))]
            for (g, p, *m), write in _blocks(leaves):
                change, new = rule.update(at, Block(g, p, m))
                for column, entries in zip(columns, [change, *new], strict=True):
                    write(column, entries)
        changes, *new_memory = columns
        trees = [with_floating_leaves(tree, new) for tree, new in zip(state[1:], new_memory, strict=True)]
        return Made(with_floating_leaves(updates, changes), type(state)(state.step + 1, *trees))

    def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
        now = values_at(given.state.step)
        wanted = {name: value for name, value in now.items() if isinstance(value, Tensor) and value.requires_grad}
        with torch.no_grad():
            at = rule.at(now, int(given.state.step))
            back, totals = _pulled(rule, at, given, cotangent, Wanted(wrt_state, bool(wanted)))
        # No total where the rule, with what it remembers, does not use the value.
        ends = [totals[name].to(value) if name in totals else torch.zeros_like(value) for name, value in wanted.items()]
        # Retained: one value may serve several groups, and several metrics.
        return back, pull_gradient(list(wanted.values()), meta, [ends], retain_graph=True)[0]

    return Transformation(init, update, pull, lambda: elementwise(init, values_at, CompiledRule(rule)))


def _pulled(rule: Rule, at: Values, given: Given, cotangent: Made, wanted: Wanted) -> tuple[Given, dict[str, Tensor]]:
    gradient, params = floating_leaves(given.gradient), floating_leaves(given.params)
    groups = [gradient] * (len(given.state) - 1)
    memory = grouped(floating_leaves(given.state), groups)
    ends = grouped(floating_leaves(cotangent.state), groups)
    # None before the last step, after which nothing reads the memory.
    some = any(leaf is not None for leaf in nonzero(joined(ends)))
    if some or wanted.state:
        ends = [[leaf.contiguous() for leaf in each] for each in ends]
    leaves = [gradient, params, floating_leaves(cotangent.updates), *memory, *(ends if some else [])]
    to_gradient = _like(gradient)
    to_params: list[Tensor] | None = None
    totals: dict[str, Tensor] = {}
    for (g, p, change, *rest), write in _blocks(leaves):
        mine, theirs = rest[: len(memory)], rest[len(memory) :]
        pulled = rule.pull(at, Block(g, p, mine), change, theirs, wanted)
        write(to_gradient, pulled.gradient)
        if pulled.params is not None:
            to_params = _like(params) if to_params is None else to_params
            write(to_params, pulled.params)
        for end, entries in zip(ends, pulled.memory, strict=wanted.state):
            write(end, entries)
        for name, share in pulled.values.items():
            totals[name] = totals[name] + share if name in totals else share
    back = with_floating_leaves(given.gradient, to_gradient)
    if not wanted.state:
        return Given(back, None, None), totals
    trees = [with_floating_leaves(*pair) for pair in zip(given.state[1:], ends, strict=True)]
    state = type(given.state)(given.state.step, *trees)
    return Given(back, state, None if to_params is None else with_floating_leaves(given.params, to_params)), totals


def _like(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]


class Write(Protocol):
    """Puts the entries of a block back to where they belong in `leaves`, which are contiguous."""

    def __call__(self, leaves: Sequence[Tensor], entries: Entries, /) -> None: ...


def _blocks(columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[list[Entries], Write]]:
    """Lists of equally shaped tensors, a block of all of them at a time, and how to write such a block."""
    kinds = [(leaf.dtype, leaf.device) for leaf in columns[0]]
    sizes = tuple(leaf.numel() for leaf in columns[0])
    flat = [[leaf.reshape(-1) for leaf in column] for column in columns]
    for kind in dict.fromkeys(kinds):
        for parts in _parts(tuple(size if k == kind else 0 for size, k in zip(sizes, kinds, strict=True))):

            def write(leaves: Sequence[Tensor], entries: Entries, parts: tuple[Part, ...] = parts) -> None:
                for part, own in zip(parts, entries.split([part.stop - part.start for part in parts]), strict=True):
                    leaves[part.leaf].view(-1)[part.start : part.stop] = own

            pieces = [[column[part.leaf][part.start : part.stop] for part in parts] for column in flat]
            yield [each[0] if len(each) == 1 else torch.cat(each) for each in pieces], write


class Part(NamedTuple):
    """Entries of one tensor."""

    leaf: int
    start: int
    stop: int


@lru_cache(maxsize=64)
def _parts(sizes: tuple[int, ...]) -> list[tuple[Part, ...]]:
    """All entries of tensors of these sizes, in blocks: parts of one large tensor, or several small tensors."""
    blocks: list[tuple[Part, ...]] = []
    small: list[Part] = []
    room = BLOCK
    for leaf, size in enumerate(sizes):
        if size >= BLOCK // 2:
            blocks += [(Part(leaf, start, min(start + BLOCK, size)),) for start in range(0, size, BLOCK)]
        elif size:
            if size > room:
                blocks.append(tuple(small))
                small, room = [], BLOCK
            small.append(Part(leaf, 0, size))
            room -= size
    return [*blocks, tuple(small)] if small else blocks
