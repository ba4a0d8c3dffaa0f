"""From the cotangents of a step's result to those of its inputs (docs/theory.md, eq. 4–6)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from metagrad._batch import BatchLoss, Evaluated, Pulled
from metagrad._curvature import Contribution, pull_forward
from metagrad._reverse import pull_gradient
from metagrad._tree import Differentiable, add, floating_leaves, grouped, joined
from metagrad._types import Params, Pullback, Tree


@dataclass(frozen=True)
class StepPullback:
    """The pullback of one step, for one list of cotangents; its graphs are gone after that.

    Attributes:
        loss: of the step's batch.
        inputs, meta: the step's inputs as fresh leaves.
        evaluated: the gradient, with its graph if `has_graph`.
        gradient: the same as fresh leaves, from which the update was computed.
        update: the parameters and the optimizer state after the step, with their graph.
        wrt_state: whether the inputs are to have a cotangent, or only `meta`.
        forward_mode: whether one forward-mode pass may replace the second backward.
    """

    loss: BatchLoss
    inputs: Differentiable
    meta: Tree
    evaluated: Evaluated
    gradient: list[Tensor]
    update: tuple[Params, Tree]
    wrt_state: bool
    has_graph: bool
    forward_mode: bool

    def __call__(self, cotangents: Sequence[Sequence[Tensor]]) -> list[Pullback]:
        # eq. 4: through the update, to the gradient (γ) and to everything the update reads directly.
        params, optimizer, _ = map(floating_leaves, self.inputs)
        sources = (self.gradient, params, optimizer, floating_leaves(self.meta))
        outputs = floating_leaves(self.update)
        given = [cotangent[: len(outputs)] for cotangent in cotangents]
        direct = [grouped(each, sources) for each in pull_gradient(outputs, joined(sources), given)]

        # eq. 5 and 6: through the gradient, to the parameters (Hγ), and through the buffers; both to meta.
        ends = [cotangent[len(outputs) :] for cotangent in cotangents]
        second = self._through_gradient([gamma for gamma, *_ in direct], ends)
        return [
            Pullback(
                [*add(to_params, through.params), *to_optimizer, *through.buffers] if self.wrt_state else None,
                add(to_meta, through.meta),
            )
            for (_, to_params, to_optimizer, to_meta), through in zip(direct, second, strict=True)
        ]

    def _through_gradient(self, gammas: Sequence[Sequence[Tensor]], ends: Sequence[Sequence[Tensor]]) -> list[Pulled]:
        if self.forward_mode and (pulled := self._forward(gammas)):
            return pulled
        if not self.has_graph:
            return self.loss.pull(self.inputs.params, self.meta, self.evaluated.starts, gammas, ends, self.wrt_state)
        state = floating_leaves(self.inputs.params), floating_leaves(self.inputs.buffers)
        groups = (*(state if self.wrt_state else ([], [])), floating_leaves(self.meta))
        outputs, given = self.evaluated.gradient, gammas
        # Usually nothing reads the buffers, and zeros need not be pulled back through the model.
        if any(bool(cotangent.any()) for end in ends for cotangent in end):
            outputs = [*outputs, *floating_leaves(self.evaluated.end.buffers)]
            given = [[*gamma, *end] for gamma, end in zip(gammas, ends, strict=True)]
        return [Pulled(*grouped(each, groups)) for each in pull_gradient(outputs, joined(groups), given)]

    def _forward(self, gammas: Sequence[Sequence[Tensor]]) -> list[Pulled] | None:
        """eq. 6 alone, by forward mode; None where that does not work. Weights of examples reach no buffer."""

        def total(contribution: Contribution, params: Params) -> list[Tensor]:
            return self.loss.total(contribution, params, self.meta, self.evaluated.starts)

        pulled = []
        for gamma in gammas:
            new = pull_forward(total, self.inputs.params, self.evaluated.gradient, gamma, floating_leaves(self.meta))
            if new is None:
                return None
            pulled.append(Pulled([], [], new))
        return pulled
