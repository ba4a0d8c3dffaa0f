"""The two ways in: `metagradient` for metrics of the trained state, `train` for training as a differentiable layer."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metagrad._custom import as_linear
from metagrad._metric import Objective, Trajectory
from metagrad._precision import refuse_low_precision
from metagrad._replay import Replay
from metagrad._run import Run
from metagrad._schedule import Binomial, Schedule
from metagrad._store import Store
from metagrad._tree import detached, differentiable, floating_leaves, grouped, independent, with_floating_leaves
from metagrad._types import Batches, Metric, Result, State, Stats, Step, Term, Tree

DEFAULT_SCHEDULE = Binomial(slots=8)


def metagradient(
    metric: Metric | Trajectory | Sequence[Metric | Trajectory],
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    schedule: Schedule = DEFAULT_SCHEDULE,
    store: Store | None = None,
    wrt_params: bool = False,
    progress: bool = False,
    resume: str | os.PathLike[str] | None = None,
    allow_low_precision: bool = False,
) -> Result:
    """The exact gradient of a metric of the trained model with respect to what training depended on.

    Trains for `len(batches)` steps, evaluates Φ = metric(state), and replays the run backwards (docs/theory.md). Every
    state that the replay computes again is compared with the first one.

    Args:
        metric: differentiable scalar of the final state (`state.params`, `state.buffers`); or a `Trajectory` for a sum
            over several states; or a list of K of either, which share the run, the replays and the gradients of steps.
            Each is tried on the initial state first, and must not change what it is given.
        step: the training step: a `TrainStep`, or anything with `init` and `__call__` (see `Step`).
        params: initial parameters by name, or a module (its buffers are then carried along), or the state of an earlier
            run. Never changed.
        batches: `batches[t]` is the batch of step t; read several times, so it must give the same each time.
        meta: tree of tensors that the loss or the optimizer reads.
        schedule: which states to keep.
        store: where to keep them; RAM by default. A schedule that keeps states on disk needs a `DiskStore`.
        wrt_params: also return the gradient of the initial parameters, optimizer state and buffers.
        progress: show a progress bar in step evaluations.
        resume: a folder. If the process is killed at any moment, the same call goes on from what is there, and gives
            the same bits. The states are kept there, so `store` must be None. Delete it when the result is safe.
        allow_low_precision: accept parameters in float16 or bfloat16, and TF32 products.

    Returns:
        Φ, its gradients, the trained state and what it cost: see `Result`. For a list of K metrics, Φ has shape (K,)
        and every gradient a leading axis K.

    Raises:
        ValueError: before training, for inputs that cannot work; the message says what to pass instead.
        NonFiniteError: if a loss, Φ or a cotangent is NaN or infinite, naming the step.
        ReplayMismatchError: if a replayed state differs in a bit from the first one, naming the step and the tensor.
        ResumeError: if the folder is damaged, of another run or in use, naming the file.
        OSError: if a state cannot be written; with `resume`, nothing that was written is lost.

    Cost: `schedule.cost(len(batches))` step evaluations of 3 forward passes each, and 9 to 12 per reversed step, of
        which 6 for each metric. Step 0 of a `weighted` loss needs no second-order pass unless `wrt_params`. Memory: the
        schedule's states and one step. Once more the reading of a state for each evaluation, for its digest. With
        `resume` about a tenth of the time more.

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
    if resume is not None and store is not None:
        raise ValueError("with `resume` the states are kept in its folder. Leave `store` out.")
    meta, run = _prepared(step, params, batches, meta, schedule, wrt_params, progress, allow_low_precision)
    objective = Objective.of(metric, len(batches))
    trial = objective.try_on(run.initial)
    outcome = run.at_once(objective.at, store) if resume is None else run.in_folder(objective.at, resume, trial)
    done, parts = outcome.done, differentiable(outcome.state)
    values = [value for value in done.values if value is not None]
    initial = [None, None, None]
    if wrt_params and done.carried is not None:
        groups = [floating_leaves(part) for part in parts]
        pairs = zip(parts, grouped(objective.stacked(done.carried), groups), strict=True)
        initial = [with_floating_leaves(part, gradient, keep_others=False) for part, gradient in pairs]
    return Result(
        value=torch.stack(values) if objective.is_list else values[0],
        meta=with_floating_leaves(meta, objective.stacked(done.totals), keep_others=False),
        params=initial[0],
        state=outcome.state,
        stats=Stats(outcome.forward, outcome.replayed, outcome.reversed, perf_counter() - start, *outcome.bytes),
        optimizer=initial[1],
        buffers=initial[2],
    )


def train(
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    schedule: Schedule = DEFAULT_SCHEDULE,
    store: Store | None = None,
    progress: bool = False,
    allow_low_precision: bool = False,
) -> State:
    """Training as a differentiable layer: the trained state, whose tensors know how they came to be.

    Backward through `state.params`, `state.buffers` or `state.optimizer` replays the run in reverse and leaves exact
    gradients in every tensor of `meta` and of the initial state that requires one. The reverse pass runs once and
    cannot itself be differentiated.

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
    # Copied: the tensors of `meta` may be changed by an outer optimizer before backward replays the run.
    own, run = _prepared(step, params, batches, independent(meta), schedule, True, progress, allow_low_precision)
    sources = _sources(params, run.initial)
    if not any(source is not None and source.requires_grad for source in sources):
        run = replace(run, wrt_params=False)
    layer = _Layer(run.begin(store), run.initial)
    outputs = _Training.apply(layer, *sources, *floating_leaves(meta))  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    assert layer.final is not None
    parts = differentiable(layer.final)
    trained = grouped(outputs, [floating_leaves(part) for part in parts])
    tree, optimizer, buffers = (with_floating_leaves(*pair) for pair in zip(parts, trained, strict=True))
    return layer.final._replace(params=tree, optimizer=optimizer, buffers=buffers)


@dataclass
class _Layer:
    """What `_Training` carries from forward to backward besides tensors."""

    replay: Replay
    initial: State
    final: State | None = None


class _Training(torch.autograd.Function):
    """Initial state and metaparameters ↦ trained state."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, *leaves: Tensor | None) -> tuple[Tensor, ...]:
        final = layer.replay.forward(layer.initial)
        # Detached: the outputs will know this node, and the node must not know them, or neither is ever freed.
        layer.final = detached(final)
        ctx.layer, ctx.given = layer, [leaf is not None for leaf in leaves]
        return tuple(floating_leaves(differentiable(final)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        layer: _Layer = ctx.layer
        assert layer.final is not None

        def terms(state: State) -> list[Term | None]:
            last = state.step == len(layer.replay.batches)
            return [Term(cotangent[0].new_zeros(()), list(cotangent)) if last else None]

        done = layer.replay.reverse(layer.final, terms)
        layer.replay.store.close()
        num_initial = len(floating_leaves(differentiable(layer.initial)))
        initial = done.carried[0] if done.carried is not None else [None] * num_initial
        pairs = zip(ctx.given, [*initial, *done.totals[0]], strict=True)
        return (None, *(gradient if given else None for given, gradient in pairs))


def _prepared(
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    schedule: Schedule,
    wrt_params: bool,
    progress: bool,
    allow_low_precision: bool,
) -> tuple[Tree, Run]:
    """`meta` without a graph and the run, once everything that can be checked before training has been."""
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing can be differentiated under torch.inference_mode(). Use torch.no_grad() instead.")
    linear = as_linear(step)
    linear.validate(batches, meta)
    for accessor, leaf in zip(*optree.tree_flatten_with_accessor(meta)[:2], strict=True):
        if not isinstance(leaf, Tensor | int | float | str):
            raise ValueError(
                f"{accessor.codify('meta')} is a {type(leaf).__name__}, whose tensors would be taken as constants. Use "
                "dicts, lists, tuples and named tuples of tensors, for instance dict(...)."
            )
    # Detached: the gradient with respect to these values is what is asked for, not that of whatever made them.
    meta = detached(meta)
    initial = linear.init(params, meta)
    refuse_low_precision(initial, allow_low_precision)
    return meta, Run(linear, initial, batches, meta, schedule, wrt_params, progress)


def _sources(params: Mapping[str, Tensor] | nn.Module | State, initial: State) -> list[Tensor | None]:
    """The user's own tensors, one for each differentiable leaf of the initial state; None where that was made new.

    Raises:
        ValueError: if a tensor that is to have a gradient is not in the initial state.
    """
    if isinstance(params, State):
        return list(floating_leaves(differentiable(params)))
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else dict(params)
    for name, tensor in named.items():
        if tensor.requires_grad and name not in initial.params:
            raise ValueError(
                f"parameter {name!r} requires a gradient, but the step's initial state has only "
                f"{', '.join(map(repr, initial.params))}. Let `init` keep the names it is given."
            )
    made_new = len(floating_leaves((initial.optimizer, initial.buffers)))
    return [*(named.get(name) for name in sorted(initial.params)), *[None] * made_new]
