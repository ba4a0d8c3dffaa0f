"""This library: states in RAM, states on disk, graphs too, the fastest curvature, and compiled."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

import metagrad as mg
from benchmarks.peers.attempt import Attempt, Clock
from benchmarks.peers.cases import EPS_ROOT, LR, WEIGHT_DECAY, Case
from benchmarks.peers.tasks import Task


def ours(task: Task, case: Case) -> Attempt:
    return _attempt(task, case, step_of(task, case), lambda folder: mg.RamStore())


def ours_on_disk(task: Task, case: Case) -> Attempt:
    return _attempt(task, case, step_of(task, case), mg.DiskStore)


def ours_with_graphs(task: Task, case: Case) -> Attempt:
    """The graphs of all steps kept in RAM beside the states, as an unrolled run keeps them.

    Raises:
        ValueError: where the case keeps fewer states, or cuts batches, whose graphs are not kept.
    """
    if case.kept != "all" or case.num_pieces > 1:
        raise ValueError("graphs are kept with all states, of whole batches")
    schedule = mg.EveryStep(num_graphs=case.num_steps)
    return _attempt(task, case, step_of(task, case), lambda folder: mg.RamStore(), schedule)


def ours_auto(task: Task, case: Case) -> Attempt:
    """The fastest of three ways to second derivatives, chosen in the first attempt; states in RAM."""
    return _attempt(task, case, replace(step_of(task, case), curvature="auto"), lambda folder: mg.RamStore())


def ours_compiled(task: Task, case: Case) -> Attempt:
    """States in RAM.

    Raises:
        UserWarning: if a part of the step would run uncompiled, which is another contender.
    """
    attempt = _attempt(task, case, compiled(step_of(task, case)), lambda folder: mg.RamStore())

    def strict(clock: Clock) -> Tensor | None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="compile=True has no effect")
            return attempt(clock)

    return strict


def step_of(task: Task, case: Case) -> mg.TrainStep:
    if case.optimizer == "adamw":
        optimizer = mg.optim.adamw(LR, eps_root=EPS_ROOT, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = mg.optim.sgd(LR)
    size = None if case.num_pieces == 1 else task.batch_size // case.num_pieces
    return mg.TrainStep(mg.weighted(task.losses), optimizer, microbatch_size=size)


def compiled(step: mg.TrainStep) -> mg.TrainStep:
    return replace(step, compile=True)


def _attempt(
    task: Task,
    case: Case,
    step: mg.TrainStep,
    store: Callable[[Path], mg.Store],
    schedule: mg.Schedule | None = None,
) -> Attempt:
    chosen = schedule or (mg.EveryStep() if case.kept == "all" else mg.Binomial(case.num_slots))

    def metric(state: mg.State) -> Tensor:
        return task.metric(state.params)

    def attempt(clock: Clock) -> Tensor:
        params, meta = task.initial(), {"weights": task.weights()}
        with TemporaryDirectory() as folder, clock:
            result = mg.metagradient(
                metric, step, params, task.batches, meta, schedule=chosen, store=store(Path(folder))
            )
        return result.meta["weights"]

    return attempt
