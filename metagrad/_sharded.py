"""A step whose state is divided among ranks: whole parameters are there only while a loss is differentiated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from metagrad._batch import Evaluated, Start
from metagrad._initial import trainable
from metagrad._pullback import StepPullback
from metagrad._random import seeded
from metagrad._ranks import Ranks
from metagrad._refusals import refuse_other_structure
from metagrad._replay import check_finite
from metagrad._rows import (
    Memory,
    Shapes,
    cut,
    distributed,
    given_whole,
    like_whole,
    of_each,
    own_rows,
    seen_by_a_metric,
)
from metagrad._sharded_loss import ShardedLoss
from metagrad._step import TrainStep, updated
from metagrad._transformation import Divided, Given, Made, Transformation
from metagrad._tree import detached, differentiable, fresh, independent
from metagrad._types import Batches, Params, Pull, Pullback, State, Tree
from metagrad._witness import digests


@dataclass(frozen=True)
class Sharded:
    """A `TrainStep` of several ranks, each of which has rows of the parameters and of all that goes with them.

    Parameters, the optimizer's state, cotangents and kept states are divided along each tensor's first axis, as
    `torch.chunk` does it. Whole parameters are gathered while a step, or its pullback, differentiates the loss, and for
    the metric. Numbers are those of one process but for rounding, and the same under every schedule.

        step = mg.distributed.Sharded(mg.TrainStep(loss, optimizer, ranks=ranks))
        result = mg.metagradient(metric, step, params, ranks.part(batches), meta)

    Tensors of `result.state`, `result.params` and `result.optimizer` come back as torch's `DTensor`; `full_tensor()`,
    on all ranks together, gives one whole. Initial parameters may be `DTensor`s, of FSDP for instance.

    Args:
        step: with `ranks`, and an optimizer that treats every entry alike, but for clipping: `mg.optim.sgd`, `adam`,
            `adamw`, `clip`, `groups` of these.

    Raises:
        ValueError: if the step has no ranks.

    Cost: beside a rank's share of everything kept the memory of one gradient's differentiation, with whole parameters.
        Several metrics are pulled back one after the other, 9 forward passes for each.
    """

    step: TrainStep

    def __post_init__(self) -> None:
        if not isinstance(self.step, TrainStep) or self.step.ranks is None:
            raise ValueError(
                f"`step` is {type(self.step).__name__} without `ranks`, among which its state would be divided. Pass "
                "mg.TrainStep(loss, optimizer, ranks=mg.distributed.start())."
            )

    @property
    def ranks(self) -> Ranks:
        """Those of the step."""
        assert self.step.ranks is not None
        return self.step.ranks

    def validate(self, batches: Batches, meta: Tree) -> None:
        """Check all batches, and that the optimizer can be given rows.

        Raises:
            ValueError: as `TrainStep.validate`, and for an optimizer that has to see whole parameters.
        """
        self.step.validate(batches, meta)
        if self.step.transformation(meta).on_rows is None:
            raise ValueError(
                "the optimizer cannot be sharded: an entry's update depends on others (Muon's does), or nobody can "
                "know that it does not (TorchOpt's own, and what a user wrote). Use mg.optim.sgd, adam, adamw, clip, "
                "or groups of these, or pass the step without `Sharded`."
            )

    def init(self, params: Mapping[str, Tensor] | nn.Module | State, meta: Tree) -> State:
        """This rank's rows of the state before step 0.

        Raises:
            ValueError: as `TrainStep.init`.
        """
        given = trainable(params)
        shapes = {name: tuple(tensor.shape) for name, tensor in given.params.items()}
        own = {name: own_rows(tensor, self.ranks) for name, tensor in given.params.items()}
        optimizer = self._transformation(meta, own, shapes).init(own)
        if isinstance(params, State):
            remembered = cut(given.optimizer, self.ranks)
            refuse_other_structure("this rank's part of the optimizer state", remembered, optimizer)
            optimizer = remembered
        rng = given.rng or seeded(self.step.seed, own)
        whole = given_whole((given.params, given.optimizer)), given.buffers, rng
        self.ranks.refuse_different("the initial parameters, buffers, optimizer state or `seed`", whole, digests)
        return State(own, independent(given.buffers), Memory(shapes, optimizer), rng, step=0)

    def __call__(self, state: State, batch: Tree, meta: Tree) -> NoReturn:
        """Nothing: the state is divided, and what calls a step reads whole ones."""
        raise ValueError(
            "a sharded step is run by mg.metagradient alone. Elsewhere (mg.check, mg.attribution, a loop of your own) "
            "pass the `TrainStep` itself."
        )

    def advance(self, state: State, batch: Tree, meta: Tree) -> tuple[State, Evaluated]:
        """The next state, and this rank's rows of the gradient."""
        inner, shapes = _opened(state)
        start = Start(state.buffers, state.rng)
        evaluated = self._loss_of(batch, state.step, shapes).gradient(state.params, start, meta)
        with torch.no_grad():
            new = updated(inner, evaluated, self._transformation(meta, state.params, shapes))
        return _closed(new, shapes), evaluated

    def vjp(
        self, state: State, batch: Tree, meta: Tree, *, wrt_state: bool, kept: Evaluated | None = None
    ) -> tuple[Callable[[], State], Pull]:
        """The next state, and the map that pulls rows of its cotangents back to rows (docs/theory.md, eq. 4–6)."""
        inner, shapes = _opened(state)
        # Fresh leaves: the cotangents will carry everything that comes after this step.
        inputs, meta = fresh(differentiable(inner)), fresh(meta)
        loss = self._loss_of(batch, state.step, shapes)
        evaluated = kept or loss.gradient(state.params, Start(state.buffers, state.rng), meta)
        with torch.enable_grad():
            optimizer = self._transformation(meta, state.params, shapes)
        linear = self.step.is_linear(batch, meta)
        through = StepPullback(loss, optimizer, inputs, meta, evaluated, wrt_state, has_graph=False, linear=linear)

        def after() -> State:
            with torch.no_grad():
                return _closed(
                    updated(inner, detached(evaluated), self._transformation(meta, state.params, shapes)), shapes
                )

        def pull(cotangents: Sequence[Sequence[Tensor]]) -> list[Pullback]:
            pulled = through(cotangents)
            for each in pulled:
                self._refuse_non_finite(state, meta, each)
            return pulled

        return after, pull

    def read(self, state: State) -> State:
        """`state` with whole parameters; a metric that asks for the optimizer's state is refused."""
        return seen_by_a_metric(state, self.ranks)

    def shown(self, part: State, num_metrics: int | None) -> State:
        """`part` in torch's distributed tensors."""
        return distributed(part, self.ranks, num_metrics)

    def _loss_of(self, batch: Tree, step: int, shapes: Shapes) -> ShardedLoss:
        return ShardedLoss(self.step.loss_of(batch, step, sharded=True), self.ranks, shapes)

    def _transformation(self, meta: Tree, rows: Params, shapes: Shapes) -> Transformation:
        on_rows = self.step.transformation(meta).on_rows
        assert on_rows is not None  # `validate` has seen to it.
        own = on_rows(Divided(like_whole(rows, shapes), lambda number: of_each(number, self.ranks)))

        def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
            back, to_meta = own.pull(given, cotangent, meta, wrt_state)
            # Every rank's rows have a part in what a hyperparameter does. That of the data is summed by the loss.
            return back, self.ranks.sum(to_meta, "the pullback of the update")

        return Transformation(own.init, own.update, own.apply, pull)

    def _refuse_non_finite(self, state: State, meta: Tree, pulled: Pullback) -> None:
        """Raise on every rank where one has a NaN or an infinity; the replay of the others would wait for it."""
        to_state = pulled.state or []
        marks = self.ranks.marks([*to_state, *pulled.meta], f"the cotangents of step {state.step}")
        of_state = None if pulled.state is None else marks[: len(to_state)]
        check_finite(state, meta, Pullback(of_state, marks[len(to_state) :]))


def _opened(state: State) -> tuple[State, Shapes]:
    """The state as the optimizer knows it, and the shapes of whole parameters."""
    return state._replace(optimizer=state.optimizer.optimizer), state.optimizer.shapes


def _closed(state: State, shapes: Shapes) -> State:
    return state._replace(optimizer=Memory(dict(shapes), state.optimizer))
