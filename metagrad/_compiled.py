"""The derivatives of a loss as compiled graphs: one for the gradient, one for its pullback, for each shape of a batch.

Reverse mode over reverse mode is traced into one flat graph of operations, from which what nobody asks for is dropped:
products for a gradient that is known, everything behind a cotangent of zeros. torch's inductor compiles it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from metagrad._agreement import disagreement, reason_of, warn_uncompiled
from metagrad._derivatives import Gradient, ReverseOverReverse, gradient_at, pulled_at
from metagrad._evaluation import Evaluation, Point
from metagrad._modes import Cotangents, Pulled
from metagrad._random import cuda_devices, generator_states
from metagrad._tree import describe, detached, tensor_leaves
from metagrad._types import Tree

MAX_GRAPHS = 16  # of a step; a graph takes seconds to minutes to make

Flat = Callable[..., Any]


@dataclass
class Compiled:
    """Compiled derivatives, each proved when it is made against the uncompiled ones, which take over where it fails.

    Attributes:
        graphs: what was compiled, by what is computed and the shapes it is computed from; None where it failed.
    """

    graphs: dict[tuple[object, ...], "Graph | None"] = field(default_factory=dict)
    plain: ReverseOverReverse = field(default_factory=ReverseOverReverse)
    name = "compiled"

    def gradient(self, evaluate: Evaluation, at: Point) -> Gradient:
        """∇_θ at a point."""
        made = self._run(
            ("gradient", _kind(evaluate)),
            lambda given: gradient_at(evaluate, given),
            lambda: self.plain.gradient(evaluate, at),
            at,
        )
        return Gradient(*detached(made))

    def pull(
        self, evaluate: Evaluation, at: Point, gammas: Cotangents, ends: Cotangents, wrt_params: bool
    ) -> list[Pulled]:
        """The pullback for all γ in one graph."""
        made = self._run(
            ("pullback", _kind(evaluate), wrt_params),
            lambda given: pulled_at(evaluate, given[0], given[1], given[2], wrt_params),
            lambda: self.plain.pull(evaluate, at, gammas, ends, wrt_params),
            (at, gammas, ends),
        )
        return [Pulled(*each) for each in detached(made)]

    def _run(
        self, what: tuple[object, ...], traced: Callable[[Any], Tree], plain: Callable[[], Tree], given: Tree
    ) -> Tree:
        given = detached(given)
        key = (*what, optree.tree_structure(given), *map(_shape, optree.tree_leaves(given)))
        if key not in self.graphs:
            if len(self.graphs) >= MAX_GRAPHS:
                warn_uncompiled(f"the batches have too many shapes ({describe(given)} is number {MAX_GRAPHS + 1})")
                return plain()
            self.graphs[key] = _proved(traced, plain, given)
        graph = self.graphs[key]
        return plain() if graph is None else graph(given)


@dataclass(frozen=True)
class Graph:
    """A compiled function of the tensors of a tree, and how its results are put together."""

    function: Callable[..., Sequence[Tensor]]
    spec: Any

    def __call__(self, given: Tree) -> Tree:
        """What the function gives at the tensors of `given`."""
        with torch.no_grad():
            return optree.tree_unflatten(self.spec, self.function(*tensor_leaves(given)))


def _proved(traced: Callable[[Any], Tree], plain: Callable[[], Tree], given: Tree) -> Graph | None:
    """The compiled function, or None, after a warning, where it cannot be made or does not give what `plain` does."""
    devices = cuda_devices(tensor_leaves(given))
    try:
        with torch.random.fork_rng(devices):
            graph = _compiled(traced, given)
            found, drawn = graph(given), generator_states(devices)
    except Exception as error:  # Whatever compilers raise; what the loss itself raises, the uncompiled one will.
        warn_uncompiled(reason_of(error))
        return None
    with torch.random.fork_rng(devices):
        gap = disagreement(found, plain())
        if gap is None and not all(map(torch.equal, drawn, generator_states(devices))):
            gap = "it draws other random numbers"
    if gap is not None:
        warn_uncompiled(gap)
        return None
    return graph


def _compiled(traced: Callable[[Any], Tree], given: Tree) -> Graph:
    leaves, spec = optree.tree_flatten(given)
    made = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        following = iter(tensors)
        tree = optree.tree_unflatten(spec, [next(following) if isinstance(x, Tensor) else x for x in leaves])
        results, structure = optree.tree_flatten(traced(tree))
        made.append(structure)
        return [x.detach() for x in results]

    # Fake tensors: a loss that reads a value fails here, instead of having it written into the graph.
    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensor_leaves(given))
    options: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}  # torch's own random numbers
    return Graph(torch.compile(graph, fullgraph=True, dynamic=False, options=options), made[0])


def _kind(evaluate: Evaluation) -> tuple[object, ...]:
    """What of an evaluation is written into a graph."""
    return evaluate.num_examples, evaluate.num_total


def _shape(leaf: object) -> object:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
