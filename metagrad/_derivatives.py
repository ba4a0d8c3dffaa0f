"""The gradient of one micro-batch's loss, and the way back through it: eq. 1, 5 and 6 of docs/theory.md."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metagrad._buffers import refuse_unseen_changes
from metagrad._evaluation import Evaluation, Point
from metagrad._loss import loss_gradient
from metagrad._modes import Cotangents, Evaluate, Inputs, Pulled, reverse_over_reverse
from metagrad._tree import detached, fresh
from metagrad._types import Params, Scalar, Tree


class Gradient(NamedTuple):
    """∇_θ of a share, the losses that it is of, and the buffers after it."""

    gradient: list[Tensor]
    losses: Tensor
    buffers: Params


class Derivatives(Protocol):
    """A way to differentiate a micro-batch's loss once and twice."""

    @property
    def name(self) -> str:
        """How `Stats` calls it."""
        ...

    def gradient(self, evaluate: Evaluation, at: Point, /) -> Gradient:
        """∇_θ at a point, without a graph."""
        ...

    def pull(
        self, evaluate: Evaluation, at: Point, gammas: Cotangents, ends: Cotangents, wrt_params: bool, /
    ) -> list[Pulled]:
        """From cotangents γ of the gradient, and those of the buffers after it, to those of the point."""
        ...


class ReverseOverReverse:
    """Plain reverse mode, twice."""

    name = "reverse-over-reverse"

    def gradient(self, evaluate: Evaluation, at: Point) -> Gradient:
        """∇_θ without a graph."""
        found = gradient_at(evaluate, at)
        refuse_unseen_changes(at.buffers, found.buffers)
        # Detached: without a graph nothing is differentiated later, so nothing may be kept alive.
        return found._replace(buffers=detached(found.buffers))

    def pull(
        self, evaluate: Evaluation, at: Point, gammas: Cotangents, ends: Cotangents, wrt_params: bool
    ) -> list[Pulled]:
        """One backward pass through the graph of the gradient for each γ."""
        return pulled_at(evaluate, at, gammas, ends, wrt_params)


def gradient_at(evaluate: Evaluation, at: Point, keep_graph: bool = False) -> Gradient:
    """∇_θ at a point; with `keep_graph` in terms of the point's own tensors, otherwise of copies of the parameters."""
    with torch.enable_grad():
        # Views: the gradient is that at given buffers, which may themselves depend on the parameters.
        own = {name: p.view_as(p) for name, p in at.params.items()} if keep_graph else fresh(at.params)
        share, losses, buffers = evaluate(at._replace(params=own))
        return Gradient(loss_gradient(share, own, keep_graph), losses, buffers)


def pulled_at(evaluate: Evaluation, at: Point, gammas: Cotangents, ends: Cotangents, wrt_params: bool) -> list[Pulled]:
    """Reverse mode over reverse mode from fresh leaves."""
    return reverse_over_reverse(*function_at(evaluate, at), gammas, ends, wrt_params)


def function_at(evaluate: Evaluation, at: Point) -> tuple[Evaluate, Inputs]:
    """A micro-batch's share as a function of what is differentiated, and where."""

    def share(params: Params, buffers: Params, meta: Tree) -> tuple[Scalar, Params]:
        found, _, after = evaluate(Point(params, buffers, at.batch, meta))
        return found, after

    return share, Inputs(at.params, at.buffers, at.meta)
