"""The gradient of a batch's mean loss, micro-batch by micro-batch, and its pullback (theory.md, eq. 1, 5 and 6)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metagrad._agreement import disagreement
from metagrad._buffers import refuse_unseen_changes
from metagrad._derivatives import Derivatives, gradient_at
from metagrad._evaluation import Evaluation, Point
from metagrad._exchange import sums_of_rows
from metagrad._forward import Contribution, Slope, pull_forward
from metagrad._loss import cut, refuse_non_finite_losses
from metagrad._modes import Cotangents, Pulled
from metagrad._random import drawing
from metagrad._ranks import Ranks
from metagrad._refusals import refuse_non_finite_gradient
from metagrad._reverse import nonzero
from metagrad._tree import add, floating_leaves, grouped, joined, tensor_leaves
from metagrad._types import Loss, NonFiniteError, Params, Tree
from metagrad._witness import digests


class Start(NamedTuple):
    """The buffers and random generators that a micro-batch begins with."""

    buffers: Params
    rng: tuple[Tensor, ...]


class Evaluated(NamedTuple):
    """Everything of a step that is known before its update; enough to pull back without evaluating it again.

    `drew` says whether the loss drew random numbers.
    """

    gradient: list[Tensor]
    starts: list[Start]
    end: Start
    drew: bool


@dataclass(frozen=True)
class BatchLoss:
    """The mean loss of the batch of `step`, in micro-batches one after the other, each from the buffers of the last.

    Attributes:
        reverse_microbatch_size: of the pullback, if another; then each loss is a function of its example alone.
        derivatives: how one micro-batch's loss is differentiated where no graph is kept.
        ranks: the processes that hold the other parts of the batch; sums over micro-batches are over theirs, too.
        sharded: whether of what has a part for each parameter, each rank is to have its rows of the sum alone.
    """

    loss: Loss
    batch: Tree
    step: int
    microbatch_size: int | None
    reverse_microbatch_size: int | None
    constant_buffers: bool
    derivatives: Derivatives
    ranks: Ranks | None
    sharded: bool = False

    def gradient(self, params: Params, start: Start, meta: Tree, keep_graph: bool) -> Evaluated:
        """∇_θ of the mean loss at `params` (eq. 1), checked to be finite; with a graph from the tensors given."""
        end, starts, seen = start, [], []
        if self.ranks is not None:
            own, common = self.ranks.own_random(start.rng, params)
            end = Start(start.buffers, own)
        total: list[Tensor] = []
        for evaluate, batch in self._pieces(self.microbatch_size):
            starts.append(end)
            with drawing(end.rng, params) as rng:
                at = Point(params, end.buffers, batch, meta)
                if keep_graph:
                    new, losses, buffers = gradient_at(evaluate, at, keep_graph=True)
                    refuse_unseen_changes(end.buffers, buffers)
                else:
                    new, losses, buffers = self.derivatives.gradient(evaluate, at)
            end = Start(buffers, rng[0])
            total = add(total, new) if total else new
            seen.append(losses)
        drew = not all(map(torch.equal, starts[0].rng, end.rng))
        num_wrong = 0
        if self.ranks is not None:
            num_wrong = self.ranks.count(sum(int((~torch.isfinite(x)).sum()) for x in seen), total[0].device)
            end = Start(self._same_buffers(start.buffers, end.buffers, self.ranks), common)
            # Before anything is refused: the ranks refuse together, and nobody waits for one that has stopped.
            total = self._over_ranks(total, self.ranks, "the gradient")
        marks = total
        if self.ranks is not None and self.sharded:
            marks = self.ranks.marks(total, f"the gradient of step {self.step}")
        for losses in seen:
            refuse_non_finite_losses(losses, self.step)
        if num_wrong > 0:
            raise NonFiniteError(f"the training loss is not finite at step {self.step} on another rank.")
        refuse_non_finite_gradient(params, marks, self.step)
        evaluated = Evaluated(total, starts, end, drew)
        if self.reverse_microbatch_size is not None and self.step == 0:
            self._refuse_company(params, meta, evaluated)  # Now, before the others are run.
        return evaluated

    def forward(
        self, params: Params, meta: Tree, evaluated: Evaluated, gammas: Cotangents, slopes: Sequence[Slope]
    ) -> list[Pulled] | None:
        """eq. 6 alone, by forward mode; None where that does not work. Weights of examples reach no buffer."""

        def total(contribution: Contribution, params: Params) -> list[Tensor]:
            return self._total(contribution, params, meta, evaluated.starts)

        pulled = []
        for gamma, slope in zip(gammas, slopes, strict=True):
            new = pull_forward(total, params, gamma, slope, floating_leaves(meta))
            if new is None:
                return None
            pulled.append(Pulled([], [], new))
        return pulled

    def _total(self, contribution: Contribution, params: Params, meta: Tree, starts: Sequence[Start]) -> list[Tensor]:
        """The sum over micro-batches of a `contribution` of each one's share of the loss."""
        total: list[Tensor] = []
        for evaluate, batch, start in self._reversible(starts):
            with drawing(start.rng, params), torch.enable_grad():
                new = contribution(evaluate(Point(params, start.buffers, batch, meta)).share)
            total = add(total, new) if total else new
        return total if self.ranks is None else self.ranks.sum(total, f"the pullback of step {self.step}")

    def pull(
        self,
        params: Params,
        meta: Tree,
        evaluated: Evaluated,
        gammas: Cotangents,
        ends: Cotangents,
        wrt_params: bool,
    ) -> list[Pulled]:
        """eq. 5 and 6 for each of several γ, last micro-batch first.

        Args:
            evaluated: what `gradient` gave.
            gammas, ends: cotangents of the gradient and of the buffers after the step.
        """
        if self.reverse_microbatch_size is not None:
            self._refuse_company(params, meta, evaluated)
        if self.ranks is not None and self.ranks.rank > 0:
            ends = [[None] * len(end) for end in ends]  # In the sum over the ranks once.
        totals: list[Pulled] | None = None
        for evaluate, batch, start in reversed(self._reversible(evaluated.starts)):
            # One micro-batch's graph at a time, joined to the one before by its buffers' cotangent.
            with drawing(start.rng, params):
                at = Point(params, start.buffers, batch, meta)
                new = self.derivatives.pull(evaluate, at, gammas, ends, wrt_params)
            ends = [nonzero(each.buffers) for each in new]
            totals = new if totals is None else [_sum(*pair) for pair in zip(totals, new, strict=True)]
            del new  # As large as the parameters, and not to be there beside the next graph.
        assert totals is not None
        return totals if self.ranks is None else self._summed(totals, self.ranks)

    def _refuse_company(self, params: Params, meta: Tree, evaluated: Evaluated) -> None:
        """Raise unless the pieces of the reverse pass, which cuts the batch elsewhere, have the same gradient."""
        start, end = evaluated.starts[0], evaluated.end
        changed = [name for name, buffer in start.buffers.items() if not torch.equal(buffer, end.buffers[name])]
        total: list[Tensor] = []
        for evaluate, batch in self._pieces(self.reverse_microbatch_size):
            with drawing(start.rng, params):
                new = self.derivatives.gradient(evaluate, Point(params, start.buffers, batch, meta)).gradient
            total = add(total, new) if total else new
        wrong = bool(changed) or evaluated.drew
        if self.ranks is not None:
            total = self._over_ranks(total, self.ranks, "the gradient")
        wrong = wrong or disagreement(total, evaluated.gradient) is not None
        if self.ranks is not None:
            wrong = self.ranks.count(int(wrong), total[0].device) > 0  # Rows may differ where others do not.
        if wrong:
            why = "it draws random numbers" if evaluated.drew else ""
            why = f"it changes buffer {changed[0]!r}" if changed else why
            raise ValueError(
                "`reverse_microbatch_size` cuts the batch in other places than the forward run does, but the loss of "
                f"an example depends on the others of its micro-batch ({why or 'as under batch norm'}) at step "
                f"{self.step}. Set `microbatch_size` instead, which is that of both."
            )

    def _reversible(self, starts: Sequence[Start]) -> list[tuple[Evaluation, Tree, Start]]:
        pieces = self._pieces(self.reverse_microbatch_size or self.microbatch_size)
        # Where the reverse pass cuts elsewhere, all micro-batches begin alike.
        begun = starts if self.reverse_microbatch_size is None else [starts[0]] * len(pieces)
        return [(*piece, start) for piece, start in zip(pieces, begun, strict=True)]

    def _pieces(self, size: int | None) -> list[tuple[Evaluation, Tree]]:
        if self.ranks is None:
            pieces = list(cut(self.batch, size))
        else:
            own = list(cut(self.batch, size or sys.maxsize))
            device = tensor_leaves(self.batch)[0].device
            whole = self.ranks.count(own[0].num_total or 0, device)
            pieces = [piece._replace(num_total=whole) for piece in own]
        return [
            (Evaluation(self.loss, self.step, piece.num_examples, piece.num_total, self.constant_buffers), piece.batch)
            for piece in pieces
        ]

    def _same_buffers(self, before: Params, after: Params, ranks: Ranks) -> Params:
        """`after`, which no rank's examples may have changed, and what counts steps alike on all."""
        for name, buffer in before.items():
            if buffer.is_floating_point() and not torch.equal(buffer, after[name]):
                raise ValueError(
                    f"the loss changes buffer {name!r} by the examples that it sees, of which every rank has others. "
                    "Use a norm without running statistics (layer or group norm), or put the module in eval mode."
                )
        others = [name for name, buffer in before.items() if not buffer.is_floating_point()]
        changed = [name for name in others if not torch.equal(before[name], after[name])]
        # Masks do not change, and are not worth digests at every step.
        if others and ranks.count(len(changed), before[others[0]].device):
            ranks.refuse_different(f"the buffers after step {self.step}", after, digests)
        return after

    def _over_ranks(self, total: list[Tensor], ranks: Ranks, what: str) -> list[Tensor]:
        """The sum over the ranks of one tensor for each parameter, or this rank's rows of it."""
        what = f"{what} of step {self.step}"
        if not self.sharded:
            return ranks.sum(total, what)
        return sums_of_rows(total, ranks, what)

    def _summed(self, totals: list[Pulled], ranks: Ranks) -> list[Pulled]:
        """The sum over the ranks, of all metrics at once."""
        rows: list[list[Tensor]] = []
        if self.sharded:
            rows = [self._over_ranks(each.params, ranks, "the pullback") for each in totals]
            totals = [each._replace(params=[]) for each in totals]
        groups = [part for each in totals for part in each]
        summed = ranks.sum(joined(groups), f"the pullback of step {self.step}")
        parts = grouped(summed, groups)
        pulled = [Pulled(*parts[start : start + 3]) for start in range(0, len(parts), 3)]
        return [each._replace(params=own) for each, own in zip(pulled, rows, strict=True)] if rows else pulled


def _sum(total: Pulled, new: Pulled) -> Pulled:
    """Of two micro-batches one after the other, the later one first: its buffers are the other's."""
    return Pulled(add(total.params, new.params), new.buffers, add(total.meta, new.meta))
