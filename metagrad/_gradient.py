"""`metagradient`, and what it would cost."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor, nn

from metagrad._alike import alike, refuse_shared_folder, refuse_unequal
from metagrad._choice import AUTO
from metagrad._custom import as_linear
from metagrad._disk import DiskStore
from metagrad._estimate import Budget, Estimate, Measured, estimated, measure, within
from metagrad._metric import Objective, Trajectory
from metagrad._precision import refuse_low_precision
from metagrad._refusals import refuse_unknown_leaves
from metagrad._replay import Terms
from metagrad._run import Run, fitting_store
from metagrad._schedule import Binomial, Schedule
from metagrad._sharded import Sharded
from metagrad._step import TrainStep
from metagrad._store import Store
from metagrad._tree import (
    Differentiable,
    detached,
    differentiable,
    floating_leaves,
    grouped,
    num_bytes,
    tensor_leaves,
    with_floating_leaves,
)
from metagrad._types import Batches, Metric, Result, State, Stats, Step, Term, Tree

DEFAULT_SCHEDULE = Binomial(slots=8)


def metagradient(
    metric: Metric | Trajectory | Sequence[Metric | Trajectory],
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    schedule: Schedule | Budget = DEFAULT_SCHEDULE,
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
        schedule: which states to keep; or the bytes for them, from which one is chosen.
        store: where to keep them; RAM by default. A schedule that keeps states on disk needs a `DiskStore`.
        wrt_params: also return the gradient of the initial parameters, optimizer state and buffers.
        progress: show a progress bar in step evaluations.
        resume: a folder. If the process is killed at any moment, the same call goes on from what is there, and gives
            the same bits. The states are kept there, so `store` must be None. Delete it when the result is safe. The
            ranks of a step that has several name the same one.
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
    if resume is not None and (inner := _train_step(step)) and inner.curvature == AUTO:
        raise ValueError('with `resume` a run goes on as it began, and curvature="auto" goes by the clock. Name one.')
    meta, run = prepared(step, params, batches, meta, wrt_params, progress, allow_low_precision)
    objective = Objective.of(metric, len(batches), run.step.read)
    # Before training, whose work would be lost; a single step costs no more than to try.
    once = len(batches) == 1 and isinstance(schedule, Schedule) and resume is None
    terms: Terms = objective.at
    if run.ranks is not None:
        settings = {"the number of metrics": len(objective.terms), "`schedule`": repr(schedule)}
        settings["the states that each metric reads"] = [sorted(steps) for steps in objective.terms]
        settings |= {"`wrt_params`": wrt_params, "whether there is a `resume`": resume is not None}
        refuse_unequal(run.ranks, settings)
        refuse_shared_folder(run.ranks, store)
        terms = alike(run.ranks, objective, len(batches), whole=isinstance(step, TrainStep))
    with nullcontext() if run.ranks is None else run.ranks.failing_aloud():
        trial = [] if once else objective.try_on(run.initial)
        run = _scheduled(run, schedule, store, resume, trial)[0]
        if resume is None:
            trial = []  # As large as a state, and of no more use.
            outcome = run.at_once(terms, store)
        else:
            outcome = run.in_folder(terms, resume, trial, objective.marks(run.initial))
    done, parts = outcome.done, differentiable(run.initial)
    values = [value for value in done.values if value is not None]
    initial = [None, None, None]
    if wrt_params and done.carried is not None:
        groups = [floating_leaves(part) for part in parts]
        pairs = zip(parts, grouped(objective.stacked(done.carried), groups), strict=True)
        gradient = Differentiable(*(with_floating_leaves(*pair) for pair in pairs))
        num_metrics = len(values) if objective.is_list else None
        shown = differentiable(run.step.shown(run.initial._replace(**gradient._asdict()), num_metrics))
        initial = [with_floating_leaves(part, floating_leaves(part), keep_others=False) for part in shown]
    return Result(
        value=torch.stack(values) if objective.is_list else values[0],
        meta=with_floating_leaves(meta, objective.stacked(done.totals), keep_others=False),
        params=initial[0],
        state=run.step.shown(outcome.state, None),
        stats=Stats(
            outcome.forward,
            outcome.replayed,
            outcome.reversed,
            perf_counter() - start,
            *outcome.bytes,
            curvature=inner.derivatives.name if (inner := _train_step(step)) else None,
        ),
        optimizer=initial[1],
        buffers=initial[2],
    )


def dry_run(
    metric: Metric | Trajectory | Sequence[Metric | Trajectory],
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    schedule: Schedule | Budget = DEFAULT_SCHEDULE,
    store: Store | None = None,
    wrt_params: bool = False,
    allow_low_precision: bool = False,
) -> Estimate:
    """What `metagradient` would cost with the same arguments: evaluations, bytes, seconds. Prints as a report.

    Args and errors: those of `metagradient`. What it would refuse before training is refused here too.

    Cost: two evaluations and two reversals of step 0, whatever the number of steps.
    """
    meta, run = prepared(step, params, batches, meta, wrt_params, False, allow_low_precision)
    trial = Objective.of(metric, len(batches), run.step.read).try_on(run.initial)
    run, measured = _scheduled(run, schedule, store, None, trial, measure_anyway=True)
    fitting_store(run.schedule.plan(len(batches)), store)
    assert measured is not None
    return estimated(run, measured, store)


def prepared(
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    wrt_params: bool,
    progress: bool,
    allow_low_precision: bool,
) -> tuple[Tree, Run]:
    """`meta` without a graph and the run, once everything that can be checked before training has been."""
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing can be differentiated under torch.inference_mode(). Use torch.no_grad() instead.")
    linear = as_linear(step)
    linear.validate(batches, meta)
    refuse_unknown_leaves("meta", meta)
    # Detached: the gradient with respect to these values is what is asked for, not that of whatever made them.
    meta = detached(meta)
    initial = linear.init(params, meta)
    refuse_low_precision(initial, allow_low_precision)
    inner = _train_step(step)
    ranks = None if inner is None else inner.ranks
    return meta, Run(linear, initial, batches, meta, DEFAULT_SCHEDULE, wrt_params, progress, ranks)


def _train_step(step: Step) -> TrainStep | None:
    """The `TrainStep` that it is, or is made of."""
    inner = step.step if isinstance(step, Sharded) else step
    return inner if isinstance(inner, TrainStep) else None


def _scheduled(
    run: Run,
    schedule: Schedule | Budget,
    store: Store | None,
    resume: str | os.PathLike[str] | None,
    trial: Sequence[Term],
    measure_anyway: bool = False,
) -> tuple[Run, Measured | None]:
    """`run` under the schedule given, or under the one that a budget allows; and the measurement, if one was made."""
    if not isinstance(schedule, Schedule | Budget):
        raise ValueError(f"`schedule` is {schedule!r}. Pass a schedule such as mg.Binomial(slots=8), or an mg.Budget.")
    if not isinstance(store, Store | None):
        raise ValueError(f"`store` is {store!r}. Pass mg.RamStore(), or mg.DiskStore(folder).")
    if isinstance(schedule, Schedule) and schedule.num_graphs > 1:
        if resume is not None:
            raise ValueError("graphs do not outlive a process, so with `resume` `num_graphs` must be 1. Leave it out.")
        if (inner := _train_step(run.step)) and not inner.keeps_graph:
            raise ValueError(
                f"`num_graphs` is {schedule.num_graphs}, but a step with micro-batches, a `curvature` or compile=True "
                "keeps no graph. Leave one of the two out."
            )
    folder = store.folder if isinstance(store, DiskStore) else resume
    measured = measure(run, folder, trial) if measure_anyway or isinstance(schedule, Budget) else None
    if measured is not None and run.ranks is not None:
        # The largest of all ranks, which must come to one schedule.
        measured = Measured(*map(max, zip(*run.ranks.gathered(measured, "the cost of a step"), strict=True)))
    if isinstance(schedule, Budget):
        assert measured is not None
        # A run's folder also holds the trained state, a bookmark, and, while new ones are written, twice the
        # cotangents, the gradients and the digests.
        digests = (len(run.batches) + 1) * len(tensor_leaves(run.initial)) * 16
        pulled = len(trial) * (measured.file_bytes + num_bytes(run.meta))
        spare = 0 if resume is None else 2 * (measured.file_bytes + pulled + digests)
        schedule = within(schedule, measured, folder is not None, spare)
    return replace(run, schedule=schedule), measured
