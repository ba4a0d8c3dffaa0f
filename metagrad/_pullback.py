"""From the cotangents of a step's result to those of its inputs (docs/theory.md, eq. 4–6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metagrad._batch import Evaluated
from metagrad._forward import Slope, slope_of
from metagrad._modes import Cotangents, Pulled
from metagrad._refusals import MissingDerivativeError
from metagrad._reverse import nonzero, pull_gradient
from metagrad._transformation import Given, Made, Transformation
from metagrad._tree import Differentiable, add, floating_leaves, grouped, joined, with_floating_leaves
from metagrad._types import Params, Pullback, Tree


class Differentiated(Protocol):
    """The loss of a batch as the pullback needs it."""

    def pull(
        self,
        params: Params,
        meta: Tree,
        evaluated: Evaluated,
        gammas: Cotangents,
        ends: Cotangents,
        wrt_params: bool,
        /,
    ) -> list[Pulled]:
        """eq. 5 and 6 for each of several γ."""
        ...

    def forward(
        self, params: Params, meta: Tree, evaluated: Evaluated, gammas: Cotangents, slopes: Sequence[Slope], /
    ) -> list[Pulled] | None:
        """eq. 6 alone, for a loss that is linear in `meta`; None where that does not work."""
        ...


@dataclass(frozen=True)
class StepPullback:
    """The pullback of one step, for one list of cotangents; its graphs are gone after that.

    Attributes:
        loss: of the step's batch.
        optimizer: its transformation, of `meta`.
        inputs, meta: the step's inputs as fresh leaves.
        evaluated: the gradient, with its graph if `has_graph`.
        wrt_state: whether the inputs are to have a cotangent, or only `meta`.
        linear: whether the loss is linear in `meta`, and forward mode may replace the second backward.
    """

    loss: Differentiated
    optimizer: Transformation
    inputs: Differentiable
    meta: Tree
    evaluated: Evaluated
    wrt_state: bool
    has_graph: bool
    linear: bool

    def __call__(self, cotangents: Sequence[Sequence[Tensor]]) -> list[Pullback]:
        """The cotangents of the inputs; those given are used up."""
        groups = [floating_leaves(part) for part in self.inputs]
        to_params, to_optimizer, ends = map(list, zip(*(grouped(c, groups) for c in cotangents), strict=True))
        # eq. 4: through the update, to the gradient (γ) and to everything the update reads directly.
        direct = [self._through_update(*pair) for pair in zip(to_params, to_optimizer, strict=True)]
        # eq. 5 and 6: through the gradient, to the parameters (Hγ), and through the buffers; both to meta.
        gammas = [nonzero(floating_leaves(given.gradient)) for given, _ in direct]
        second = self._through_gradient(gammas, [nonzero(end) for end in ends])
        pulled = []
        for (given, to_meta), through in zip(direct, second, strict=True):
            state = None
            if self.wrt_state:
                params = floating_leaves(given.params)
                for total, part in zip(params, through.params, strict=True):
                    total.add_(part)
                state = [*params, *floating_leaves(given.state), *through.buffers]
            pulled.append(Pullback(state, add(to_meta, through.meta)))
        return pulled

    def _through_update(self, to_params: list[Tensor], to_optimizer: list[Tensor]) -> tuple[Given, list[Tensor]]:
        params, optimizer, _ = self.inputs
        gradient = dict(zip(params, (g.detach() for g in self.evaluated.gradient), strict=True))
        end = Made(with_floating_leaves(params, to_params), with_floating_leaves(optimizer, to_optimizer))
        with torch.enable_grad():
            given = Given(gradient, optimizer, params)
            return self.optimizer.pull(given, end, floating_leaves(self.meta), self.wrt_state)

    def _through_gradient(self, gammas: Cotangents, ends: Cotangents) -> list[Pulled]:
        if not self.has_graph:
            if self.linear and not self.wrt_state and (pulled := self._forward(gammas)):
                return pulled
            return self.loss.pull(self.inputs.params, self.meta, self.evaluated, gammas, ends, self.wrt_state)
        try:
            return self._reverse(gammas, ends)
        except MissingDerivativeError:
            # One derivative is enough where only weights are asked for.
            if self.linear and not self.wrt_state and (pulled := self._forward(gammas)):
                return pulled
            raise

    def _reverse(self, gammas: Cotangents, ends: Cotangents) -> list[Pulled]:
        state = floating_leaves(self.inputs.params), floating_leaves(self.inputs.buffers)
        groups = (*(state if self.wrt_state else ([], [])), floating_leaves(self.meta))
        outputs = [*self.evaluated.gradient, *floating_leaves(self.evaluated.end.buffers)]
        given = [[*gamma, *end] for gamma, end in zip(gammas, ends, strict=True)]
        return [Pulled(*grouped(each, groups)) for each in pull_gradient(outputs, joined(groups), given)]

    def _forward(self, gammas: Cotangents) -> list[Pulled] | None:
        slopes = [slope_of(self.evaluated.gradient, gamma) for gamma in gammas]
        return self.loss.forward(self.inputs.params, self.meta, self.evaluated, gammas, slopes)
