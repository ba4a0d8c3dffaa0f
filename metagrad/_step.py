"""One training step, θ ↦ U(θ, ∇L(θ)), and its pullback. Everything that defines the step is in the step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._batch import BatchLoss, Evaluated, Start
from metagrad._compiled import Compiled
from metagrad._curvature import CURVATURES, derivatives_of
from metagrad._derivatives import Derivatives, ReverseOverReverse
from metagrad._initial import trainable
from metagrad._loss import WeightedLoss
from metagrad._modes import REFERENCE
from metagrad._pullback import StepPullback
from metagrad._random import seeded
from metagrad._ranks import Ranks
from metagrad._refusals import refuse_changed_shapes, refuse_other_structure, refuse_unreadable
from metagrad._transformation import Transformation, chained
from metagrad._tree import describe, detached, differentiable, fresh, independent, tensor_leaves
from metagrad._types import Batches, Loss, Params, Pull, State, Tree
from metagrad._witness import digests
from metagrad.optim import adapt, clip

Optimizer: TypeAlias = GradientTransformation | Callable[[Tree], GradientTransformation]


@dataclass(frozen=True)
class TrainStep:
    """Mean loss of a batch, its gradient, clipping, the optimizer's update: one pure step.

    Attention runs on torch's math kernel: the fused ones have no second derivative.

    Args:
        loss: `loss(params, batch, meta)` → one loss per example, of which the step takes the mean over the whole
            batch, or one scalar.
        optimizer: a TorchOpt gradient transformation, or a function of `meta` that returns one.
        microbatch_size: examples differentiated at a time. Same gradient up to rounding, less memory; every tensor
            of a batch is then cut along its first axis. None: the whole batch at once.
        reverse_microbatch_size: another `microbatch_size` for the second derivatives, which take about three times the
            memory of the first. Refused where the loss of an example depends on the others of its micro-batch; to see
            that costs 3 forward passes in each step that is reversed.
        clip_norm: upper bound of the gradient's global L2 norm, differentiated; the formula is that of
            `torch.nn.utils.clip_grad_norm_`.
        seed: start of the random numbers that the loss may draw (dropout). They are part of the state, so a replay
            draws the same; the generator of the caller is left as it was.
        compile: run the loss's gradient and its pullback as compiled graphs, one of each for each shape of a batch. The
            numbers are those of the uncompiled step but for rounding, and the same in every run. Making a graph takes
            seconds to minutes, once; where it cannot be made a warning says why.
        curvature: how the way back through a gradient is computed (docs/speed.md): "reverse-over-reverse",
            "forward-over-reverse", "reverse-over-forward", or "auto", the fastest of them. The first is taken where a
            loss uses an operation that the others are not tested with, or where one of them does not agree with it.
        ranks: the processes that train together, each on its part of every batch (`metagrad.distributed`). The mean is
            over all parts, and gradients come back whole on every rank. None: this process alone.
        constant_buffers: take buffers (running statistics) as constants. Otherwise they are state like any other, and
            a metric or a loss that reads them is differentiated through them.

    Raises:
        ValueError: for a `microbatch_size` or a `clip_norm` that is not positive.
    """

    loss: Loss
    optimizer: Optimizer
    microbatch_size: int | None = None
    reverse_microbatch_size: int | None = None
    clip_norm: float | None = None
    seed: int = 0
    constant_buffers: bool = False
    compile: bool = False
    curvature: str = REFERENCE
    ranks: Ranks | None = None
    derivatives: Derivatives = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("microbatch_size", "reverse_microbatch_size"):
            size: int | None = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"`{name}` is {size}. Pass at least 1, or None.")
        if not isinstance(self.optimizer, GradientTransformation) and (
            not callable(self.optimizer) or isinstance(self.optimizer, type)
        ):
            raise ValueError(
                f"`optimizer` is {self.optimizer!r}. Pass a TorchOpt transformation such as mg.optim.adamw(lr=1e-3), "
                "or a function of `meta` that returns one; torch.optim cannot be differentiated."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"`clip_norm` is {self.clip_norm}. Pass a norm above 0, or None not to clip.")
        if self.curvature not in CURVATURES:
            raise ValueError(f"`curvature` is {self.curvature!r}. Pass one of {', '.join(map(repr, CURVATURES))}.")
        if self.compile and self.curvature != REFERENCE:
            raise ValueError(f"with compile=True the curvature is {REFERENCE!r}, compiled. Leave `curvature` out.")
        # Compiled graphs are kept with the step, so that one run after another finds them.
        object.__setattr__(self, "derivatives", Compiled() if self.compile else derivatives_of(self.curvature))

    def init(self, params: Mapping[str, Tensor] | torch.nn.Module | State, meta: Tree) -> State:
        """The state before step 0: copies of the parameters and buffers, a fresh optimizer, seeded randomness.

        A module gives its trainable parameters and all buffers, tied ones once; its frozen parameters stay inside it.
        A state, for instance of an earlier run, is continued as it is, and counted from step 0.

        Raises:
            ValueError: if there is nothing to train, an entry is not a floating-point tensor, a module with parameters
                or buffers stands in two places, or a given optimizer state belongs to another optimizer.
        """
        given = trainable(params)
        # Copies: what the caller does to the model between the run and its replay must not reach the replay.
        own: Params = independent(given.params)
        optimizer = self.transformation(meta).init(own)
        if isinstance(params, State):
            refuse_other_structure("the optimizer state", given.optimizer, optimizer)
            optimizer = independent(given.optimizer)
        state = State(own, independent(given.buffers), optimizer, given.rng or seeded(self.seed, own), step=0)
        if self.ranks is not None:
            self.ranks.refuse_different("the initial parameters, buffers, optimizer state or `seed`", state, digests)
        return state

    def validate(self, batches: Batches, meta: Tree) -> None:
        """Check all batches before any training.

        Raises:
            ValueError: for no batches, an empty batch, or weights that do not fit the batches.
        """
        if self.ranks is None:
            return self._validate(batches, meta)
        self.ranks.agreed(lambda: self._validate(batches, meta), "the batches")
        lengths = self.ranks.gathered(len(batches), "the batches")
        if len(set(lengths)) > 1:
            raise ValueError(f"the ranks have {lengths} batches. Give each its part of every batch: as many.")
        self.ranks.refuse_different("`meta`", meta, digests)

    def _validate(self, batches: Batches, meta: Tree) -> None:
        refuse_unreadable(batches)
        ranges = []
        for step in range(len(batches)):
            batch = batches[step]
            if any(leaf.numel() == 0 for leaf in tensor_leaves(batch)):
                raise ValueError(f"batch {step} holds no examples ({describe(batch)}). Leave empty batches out.")
            if isinstance(self.loss, WeightedLoss):
                ranges.append(self.loss.index_range(batch, step))
        if isinstance(self.loss, WeightedLoss):
            lowest, highest = zip(*ranges, strict=True)
            self.loss.validate(meta, min(lowest), max(highest))

    def __call__(self, state: State, batch: Tree, meta: Tree) -> State:
        """The state after one step on `batch`. With gradients enabled the result keeps its graph, otherwise not.

        Raises:
            NonFiniteError: if the loss or its gradient is NaN or infinite.
            ValueError: if the loss has the wrong shape or does not depend on the parameters.
        """
        if not torch.is_grad_enabled():
            return self.advance(state, batch, meta)[0]
        if self.ranks is not None:
            raise ValueError(
                "a step of several ranks keeps no graph. Call it under torch.no_grad(), or differentiate the run by "
                "mg.metagradient or mg.train; mg.check.unrolled wants the step of one process, without `ranks`."
            )
        # What has a graph keeps it; the other parameters become leaves of this step alone.
        params = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in state.params.items()}
        start = Start(state.buffers, state.rng)
        evaluated = self.loss_of(batch, state.step).gradient(params, start, meta, keep_graph=True)
        return updated(state._replace(params=params), evaluated, self.transformation(meta))

    def advance(self, state: State, batch: Tree, meta: Tree) -> tuple[State, Evaluated | None]:
        """The next state without a graph; and the gradient, if a pullback would have to take it again."""
        start = Start(state.buffers, state.rng)
        evaluated = self.loss_of(batch, state.step).gradient(state.params, start, meta, keep_graph=False)
        with torch.no_grad():
            new = updated(state, evaluated, self.transformation(meta))
        return new, None if self.keeps_graph else evaluated

    def vjp(
        self, state: State, batch: Tree, meta: Tree, *, wrt_state: bool, kept: Evaluated | None = None
    ) -> tuple[Callable[[], State], Pull]:
        """The state after one step on `batch`, when called for, and the map that pulls its cotangents back.

        docs/theory.md, eq. 4–6. Without `wrt_state` no Hessian product is formed. `kept` is what `advance` gave at
        `state`.

        Cost: 9 forward passes in all, or 5 where only `meta` is asked for; each further cotangent 6. Where no graph is
        kept between the gradient and its pullback (micro-batches) 12, or 9 with `kept`; and 6 where only weights are
        asked for.
        """
        # Fresh leaves: the cotangents will carry everything that comes after this step.
        inputs, meta = fresh(differentiable(state)), fresh(meta)
        loss = self.loss_of(batch, state.step)
        start = Start(inputs.buffers, state.rng) if self.keeps_graph else Start(state.buffers, state.rng)
        evaluated = kept or loss.gradient(inputs.params, start, meta, keep_graph=self.keeps_graph)
        with torch.enable_grad():
            optimizer = self.transformation(meta)
        linear = self.is_linear(batch, meta)
        pull = StepPullback(loss, optimizer, inputs, meta, evaluated, wrt_state, self.keeps_graph, linear)

        def after() -> State:
            with torch.no_grad():
                return updated(state, detached(evaluated), self.transformation(meta))

        return after, pull

    def read(self, state: State) -> State:
        """`state`: a metric sees it as it is."""
        return state

    def shown(self, part: State, num_metrics: int | None) -> State:
        """`part`: a result has it as it is."""
        return part

    @property
    def keeps_graph(self) -> bool:
        """Whether a reversed step keeps the graph of its gradient until that is pulled back."""
        uncut = self.microbatch_size is None and self.reverse_microbatch_size is None and self.ranks is None
        return uncut and isinstance(self.derivatives, ReverseOverReverse)

    def is_linear(self, batch: Tree, meta: Tree) -> bool:
        """Whether the loss is linear in `meta`, and forward mode can be checked on it."""
        # Against the gradient, in which an example of weight 0 does not appear.
        linear = isinstance(self.loss, WeightedLoss) and self.loss.can_be_checked(batch, meta) and not self.compile
        return linear if self.ranks is None else self.ranks.all(linear, tensor_leaves(batch)[0].device)

    def loss_of(self, batch: Tree, step: int, sharded: bool = False) -> BatchLoss:
        """The mean loss of the batch of a step."""
        return BatchLoss(
            self.loss,
            batch,
            step,
            self.microbatch_size,
            self.reverse_microbatch_size,
            self.constant_buffers,
            self.derivatives,
            self.ranks,
            sharded,
        )

    def transformation(self, meta: Tree) -> Transformation:
        """Clipping and the optimizer."""
        # Ours pass as they are; any other proves itself in its `init`, once a run.
        chosen = adapt(self.optimizer if isinstance(self.optimizer, GradientTransformation) else self.optimizer(meta))
        whole = chosen if self.clip_norm is None else chained(clip(self.clip_norm), chosen)
        return whole.compiled() if self.compile else whole


def updated(state: State, evaluated: Evaluated, optimizer: Transformation) -> State:
    """The state after the update by a gradient (in the order of the parameters)."""
    params = state.params
    gradient = dict(zip(params, evaluated.gradient, strict=True))
    new, memory = optimizer.apply(gradient, state.optimizer, params)
    refuse_changed_shapes(params, new)
    return State(new, evaluated.end.buffers, memory, evaluated.end.rng, state.step + 1)
