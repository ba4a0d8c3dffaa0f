"""The gradient of a batch's mean loss, micro-batch by micro-batch, and its pullback (theory.md, eq. 1, 5 and 6)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metagrad._buffers import DifferentiableStatistics, copies_of, refuse_unseen_changes
from metagrad._curvature import Contribution
from metagrad._loss import Piece, cut, loss_gradient, mean_share
from metagrad._random import drawing
from metagrad._refusals import refuse_changes_in_place, refuse_non_finite_gradient
from metagrad._reverse import pull_gradient
from metagrad._tree import add, detached, floating_leaves, fresh, grouped, independent, joined
from metagrad._types import Loss, Params, Scalar, Tree


class Start(NamedTuple):
    """The buffers and random generators that a micro-batch begins with."""

    buffers: Params
    rng: tuple[Tensor, ...]


class Evaluated(NamedTuple):
    """Everything of a step that is known before its update; enough to pull back without evaluating it again."""

    gradient: list[Tensor]
    starts: list[Start]
    end: Start


class Pulled(NamedTuple):
    """Cotangents of what a batch's gradient was computed from."""

    params: list[Tensor]
    buffers: list[Tensor]
    meta: list[Tensor]


@dataclass(frozen=True)
class BatchLoss:
    """The mean loss of the batch of `step`, in micro-batches one after the other, each from the buffers of the last."""

    loss: Loss
    batch: Tree
    step: int
    microbatch_size: int | None
    constant_buffers: bool

    def gradient(self, params: Params, start: Start, meta: Tree, keep_graph: bool) -> Evaluated:
        """∇_θ of the mean loss at `params` (eq. 1), checked to be finite."""
        end, starts = start, []
        total: list[Tensor] = []
        for piece in self._pieces():
            starts.append(end)
            with self._evaluating(end, params) as rng:
                # Views: the gradient is that at given buffers, which may themselves depend on the parameters.
                own = {name: p.view_as(p) for name, p in params.items()} if keep_graph else params
                share, buffers = self._share(own, end, piece, meta)
                new = loss_gradient(share, own, keep_graph)
            # Detached: without a graph nothing is differentiated later, so nothing may be kept alive.
            end = Start(buffers if keep_graph else detached(buffers), rng[0])
            total = add(total, new) if total else new
        refuse_non_finite_gradient(params, total, self.step)
        return Evaluated(total, starts, end)

    def total(self, contribution: Contribution, params: Params, meta: Tree, starts: Sequence[Start]) -> list[Tensor]:
        """The sum over micro-batches of a `contribution` of each one's share of the loss."""
        total: list[Tensor] = []
        for piece, start in zip(self._pieces(), starts, strict=True):
            with self._evaluating(start, params):
                new = contribution(self._share(params, start, piece, meta)[0])
            total = add(total, new) if total else new
        return total

    def pull(
        self,
        params: Params,
        meta: Tree,
        starts: Sequence[Start],
        gammas: Sequence[Sequence[Tensor]],
        ends: Sequence[Sequence[Tensor]],
        wrt_params: bool,
    ) -> list[Pulled]:
        """eq. 5 and 6 for each of several γ, last micro-batch first.

        Args:
            gammas, ends: cotangents of the gradient and of the buffers after the step.
        """
        param_leaves, meta_leaves = list(params.values()) if wrt_params else [], floating_leaves(meta)
        totals = [Pulled(_zeros(param_leaves), list(end), _zeros(meta_leaves)) for end in ends]
        for piece, start in reversed(list(zip(self._pieces(), starts, strict=True))):
            # Fresh leaves: one micro-batch's graph at a time, joined to the one before by its buffers' cotangent.
            buffers = fresh(start.buffers)
            groups = (param_leaves, floating_leaves(buffers), meta_leaves)
            with self._evaluating(start, params):
                share, after = self._share(params, start._replace(buffers=buffers), piece, meta)
                outputs = [*loss_gradient(share, params, True), *floating_leaves(after)]
                given = [[*gamma, *total.buffers] for gamma, total in zip(gammas, totals, strict=True)]
                new = [Pulled(*grouped(each, groups)) for each in pull_gradient(outputs, joined(groups), given)]
            totals = [
                Pulled(add(total.params, each.params), each.buffers, add(total.meta, each.meta))
                for total, each in zip(totals, new, strict=True)
            ]
        return totals

    def _pieces(self) -> Iterator[Piece]:
        return cut(self.batch, self.microbatch_size)

    def _share(self, params: Params, start: Start, piece: Piece, meta: Tree) -> tuple[Scalar, Params]:
        """One micro-batch's part of the mean loss, and the buffers after it."""
        # Detached on request; copied, since modules change their buffers in place, and the state is a value.
        copies = independent(start.buffers) if self.constant_buffers else copies_of(start.buffers)
        variables = {**params, **copies}
        with refuse_changes_in_place("the loss", params=params, batch=piece.batch, meta=meta):
            share = mean_share(self.loss(variables, piece.batch, meta), piece, self.step)
        refuse_unseen_changes(start.buffers, copies)
        after = {name: variables[name] for name in copies}
        return share, detached(after) if self.constant_buffers else after

    @contextmanager
    def _evaluating(self, start: Start, params: Params) -> Iterator[list[tuple[Tensor, ...]]]:
        """Gradients on, attention that can be differentiated twice, buffers too, and random numbers from `start`."""
        statistics = floating_leaves(start.buffers) and not self.constant_buffers
        with ExitStack() as stack:
            after = stack.enter_context(drawing(start.rng, params))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(DifferentiableStatistics() if statistics else nullcontext())
            yield after


def _zeros(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) for leaf in leaves]
