"""The two ways in: `metagradient` for a metric of the trained state, `train` for training as a differentiable layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metagrad._metric import by_name, checked_value, evaluate
from metagrad._replay import Replay
from metagrad._schedule import Binomial, Schedule
from metagrad._store import RamStore, Store
from metagrad._tree import detached, floating_leaves, independent, with_floating_leaves
from metagrad._types import Batches, Metric, Result, State, Stats, Step, Tree

DEFAULT_SCHEDULE = Binomial(slots=8)


def metagradient(
    metric: Metric,
    step: Step,
    params: Mapping[str, Tensor] | nn.Module,
    batches: Batches,
    meta: Tree,
    *,
    schedule: Schedule = DEFAULT_SCHEDULE,
    store: Store | None = None,
    wrt_params: bool = False,
    progress: bool = False,
) -> Result:
    """The exact gradient of a metric of the trained model with respect to what training depended on.

    Trains for `len(batches)` steps, evaluates Φ = metric(state), and replays the run backwards (docs/theory.md).

    Args:
        metric: differentiable scalar of the final state (`state.params`, `state.buffers`); buffers are constants. It is
            tried on the initial state first, and must not change what it is given.
        step: the training step, for instance a `TrainStep`.
        params: initial parameters by name, or a module (its buffers are then carried along). Never changed.
        batches: `batches[t]` is the batch of step t; read several times, so it must give the same each time.
        meta: tree of tensors that the loss or the optimizer reads.
        schedule: which states to keep.
        store: where to keep them; RAM by default.
        wrt_params: also return the gradient of the initial parameters.
        progress: show a progress bar in step evaluations.

    Returns:
        Φ, its gradients, the trained state and what it cost: see `Result`.

    Raises:
        ValueError: before training, for inputs that cannot work; the message says what to pass instead.
        NonFiniteError: if a loss, Φ or a cotangent is NaN or infinite, naming the step.

    Cost: `schedule.cost(len(batches))` step evaluations of 3 forward passes each, and 9 to 12 per reversed step. Step 0
        of a `weighted` loss needs no second-order pass unless `wrt_params`. Memory: the schedule's states and one step.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(mg.weighted(lambda p, b: (b["x"] * p["w"] - b["y"]) ** 2), mg.optim.sgd(lr=0.1))
        >>> batch = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([1.0, 0.0]), "index": torch.tensor([0, 1])}
        >>> result = mg.metagradient(
        ...     lambda state: (state.params["w"] - 1) ** 2,
        ...     step, {"w": torch.tensor(0.5)}, [batch], {"weights": torch.ones(2)},
        ... )
        >>> result.meta["weights"]
        tensor([-0.0650,  0.2600])
    """
    start = perf_counter()
    meta = _checked(step, batches, meta)
    initial = step.init(params, meta)
    if not callable(metric):
        raise ValueError(f"`metric` is a {type(metric).__name__}. Pass one function of the trained state.")
    checked_value(metric, initial, initial)  # A metric that cannot be differentiated is reported before any training.
    replay = Replay(step, batches, meta, schedule.plan(len(batches)), store or RamStore(), wrt_params, progress)
    state = replay.forward(initial)
    num_forward = replay.evaluations
    phi, cotangent = evaluate(metric, state, initial)
    gradients = replay.reverse(state, cotangent)
    replayed = replay.evaluations - num_forward
    return Result(
        value=phi,
        meta=with_floating_leaves(meta, gradients.meta, keep_others=False),
        params=by_name(state.params, gradients.state),
        state=state,
        stats=Stats(num_forward, replayed, replay.reversals, perf_counter() - start, *replay.store.peak_bytes),
    )


def train(
    step: Step,
    params: Mapping[str, Tensor] | nn.Module,
    batches: Batches,
    meta: Tree,
    *,
    schedule: Schedule = DEFAULT_SCHEDULE,
    store: Store | None = None,
    progress: bool = False,
) -> State:
    """Training as a differentiable layer: the trained state, whose `params` know how they came to be.

    Backward through `state.params` replays the run in reverse and leaves exact gradients in every tensor of `meta`
    and every initial parameter that requires one. Buffers and optimizer state come back detached. The reverse pass
    runs once and cannot itself be differentiated.

    Args, errors and cost: those of `metagradient`; the reverse part of the cost is paid in backward.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(lambda p, b, meta: (p["w"] - b) ** 2, lambda meta: mg.optim.sgd(lr=meta["lr"]))
        >>> meta = {"lr": torch.tensor(0.25, requires_grad=True)}
        >>> state = mg.train(step, {"w": torch.tensor(0.0)}, [torch.tensor([2.0])] * 2, meta)
        >>> state.params["w"].backward()
        >>> float(meta["lr"].grad)  # w = 2 - 2(1 - 2 lr)^2
        4.0
    """
    own = independent(_checked(step, batches, meta))
    initial = step.init(params, own)
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    starts = [named[name] for name in initial.params]
    wrt_params = any(start.requires_grad for start in starts)
    replay = Replay(step, batches, own, schedule.plan(len(batches)), store or RamStore(), wrt_params, progress)
    run = _Run(replay, initial)
    outputs = _Training.apply(run, *starts, *floating_leaves(meta))  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    assert run.final is not None
    return run.final._replace(params=dict(zip(initial.params, outputs, strict=True)))


@dataclass
class _Run:
    """What `_Training` carries from forward to backward besides tensors."""

    replay: Replay
    initial: State
    final: State | None = None


class _Training(torch.autograd.Function):
    """Initial parameters and metaparameters ↦ trained parameters."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *leaves: Tensor) -> tuple[Tensor, ...]:
        final = run.replay.forward(run.initial)
        # Detached: the outputs will know this node, and the node must not know them, or neither is ever freed.
        run.final = detached(final)
        ctx.run = run
        return tuple(final.params.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        num_params = len(run.initial.params)
        assert run.final is not None
        # The optimizer state came back detached, so nothing downstream can have given it a cotangent.
        unused = [torch.zeros_like(leaf) for leaf in floating_leaves(run.final.optimizer)]
        gradients = run.replay.reverse(run.final, [*grads, *unused])
        initial = gradients.state[:num_params] if gradients.state is not None else [None] * num_params
        return (None, *initial, *gradients.meta)


def _checked(step: Step, batches: Batches, meta: Tree) -> Tree:
    """`meta` without a graph, once everything that can be checked before training has been."""
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing can be differentiated under torch.inference_mode(). Use torch.no_grad() instead.")
    step.validate(batches, meta)
    for accessor, leaf in zip(*optree.tree_flatten_with_accessor(meta)[:2], strict=True):
        if not isinstance(leaf, Tensor | int | float | str):
            raise ValueError(
                f"{accessor.codify('meta')} is a {type(leaf).__name__}, whose tensors would be taken as constants. Use "
                "dicts, lists, tuples and named tuples of tensors, for instance dict(...)."
            )
    # Detached: the gradient with respect to these values is what is asked for, not that of whatever made them.
    return detached(meta)
