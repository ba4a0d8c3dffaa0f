"""The loss of a batch as a function of rows of the parameters, which are whole only while it is differentiated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metagrad._batch import BatchLoss, Evaluated, Start
from metagrad._exchange import gathered
from metagrad._forward import Slope
from metagrad._modes import Cotangents, Pulled
from metagrad._ranks import Ranks
from metagrad._rows import Shapes
from metagrad._tree import tensor_leaves
from metagrad._types import Params, Tree


@dataclass(frozen=True)
class ShardedLoss:
    """The mean loss of a batch as a function of rows of the parameters, which are gathered while it is differentiated.

    Attributes:
        loss: of whole parameters; of its gradients each rank has rows.
    """

    loss: BatchLoss
    ranks: Ranks
    shapes: Shapes

    def gradient(self, rows: Params, start: Start, meta: Tree) -> Evaluated:
        """This rank's rows of ∇_θ, without a graph."""
        return self.loss.gradient(self._whole(rows), start, meta, keep_graph=False)

    def pull(
        self, rows: Params, meta: Tree, evaluated: Evaluated, gammas: Cotangents, ends: Cotangents, wrt_params: bool
    ) -> list[Pulled]:
        """Rows of Hγ, and the rest whole, for rows of each γ; one after the other, for γ and Hγ are whole meanwhile."""
        params = self._whole(rows)
        pulled = []
        for gamma, end in zip(gammas, ends, strict=True):
            whole = self._whole_gamma(rows, gamma)
            pulled += self.loss.pull(params, meta, evaluated, [whole], [end], wrt_params)
        return pulled

    def forward(
        self, rows: Params, meta: Tree, evaluated: Evaluated, gammas: Cotangents, slopes: Sequence[Slope]
    ) -> list[Pulled] | None:
        """eq. 6 alone, for rows of each γ and this rank's part of each slope."""
        params = self._whole(rows)
        pulled: list[Pulled] = []
        for gamma, slope in zip(gammas, slopes, strict=True):
            # In one type: a rank whose γ is zero does not know that of the others.
            parts = [part.double() for part in slope]
            summed = Slope(*self.ranks.sum(parts, f"the slope of step {self.loss.step}"))
            new = self.loss.forward(params, meta, evaluated, [self._whole_gamma(rows, gamma)], [summed])
            if new is None:
                return None
            pulled += new
        return pulled

    def _whole(self, rows: Params, what: str = "the parameters") -> Params:
        shapes = [self.shapes[name] for name in rows]
        made = gathered(list(rows.values()), shapes, self.ranks, f"{what} of step {self.loss.step}")
        return dict(zip(rows, made, strict=True))

    def _whole_gamma(self, rows: Params, gamma: Sequence[Tensor | None]) -> list[Tensor | None]:
        """γ whole; None where all ranks have zeros."""
        what = "the cotangent of the gradient"
        device = tensor_leaves(rows)[0].device
        given = torch.tensor([own is not None for own in gamma], dtype=torch.int64, device=device)
        counts = self.ranks.sum([given], f"{what} of step {self.loss.step}")[0].tolist()
        wanted = {
            name: torch.zeros_like(rows[name]) if own is None else own
            for name, own, count in zip(rows, gamma, counts, strict=True)
            if count
        }
        made = self._whole(wanted, what)
        return [made.get(name) for name in rows]
