"""A whole run, forward and back: at once, or in a folder that outlives the process."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from metagrad._disk import DiskStore
from metagrad._fingerprint import fingerprint
from metagrad._plan import Plan, Save
from metagrad._ranks import Ranks
from metagrad._recut import recut
from metagrad._replay import Progress, Replay, Terms
from metagrad._resume import RunFolder, as_tensors
from metagrad._rows import Memory
from metagrad._schedule import Schedule
from metagrad._store import Bytes, Kept, RamStore, Store, TieredStore
from metagrad._tree import describe, floating_leaves
from metagrad._types import Batches, LinearStep, ReplayMismatchError, ResumeError, State, Term, Tree
from metagrad._witness import Witness


class Outcome(NamedTuple):
    """The trained state, what was pulled back, and what it cost this process."""

    state: State
    done: Progress
    forward: int
    replayed: int
    reversed: int
    bytes: Bytes


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of. Start it by one of the two methods."""

    step: LinearStep
    initial: State
    batches: Batches
    meta: Tree
    schedule: Schedule
    wrt_params: bool
    progress: bool
    ranks: Ranks | None = None

    def at_once(self, terms: Terms, store: Store | None) -> Outcome:
        """The run from its start, states kept in `store`."""
        replay = self.begin(store)
        with _closing(replay.store):
            return self._reversed(replay, replay.forward(self.initial), terms, None)

    def begin(self, store: Store | None) -> Replay:
        """The engine of a run from its start."""
        plan = self.schedule.plan(len(self.batches))
        witness = Witness() if plan.cost.replayed > 0 else None
        return self._replay(plan, fitting_store(plan, store), witness, None)

    def in_folder(
        self, terms: Terms, folder: str | os.PathLike[str], trial: Sequence[Term], marks: Mapping[str, Tree]
    ) -> Outcome:
        """The run from where an earlier process left it in `folder`, which is told of every step.

        Args:
            trial: each metric at the initial state.
            marks: what tells the metrics from others, by name.

        Raises:
            ResumeError: if the folder is not this run's, or damaged.
        """
        prints = fingerprint(self.initial, self.batches, self.meta, marks, self.wrt_params)
        begun = self._nothing_reversed(trial)
        if self.ranks is not None and isinstance(self.initial.optimizer, Memory):
            recut(Path(folder), prints, self.initial, as_tensors(begun), self.wrt_params, self.ranks)
        journal = RunFolder(folder, prints, self.initial, begun, self.wrt_params, self.ranks)
        try:
            with _closing(journal.store):
                plan = self._rest(journal)
                journal.begin(plan)
                # Asked of the schedule, since the rest of a plan with a disk may have states for RAM alone.
                store = _tiered(plan, journal.store) if self.schedule.first().on_disk else journal.store
                replay = self._replay(plan, store, journal.witness, journal)
                self._refuse_another_step(journal.witness)
                state = journal.final
                if state is None:
                    state = replay.forward(self.initial)
                    journal.trained(state)
                return self._reversed(replay, state, terms, journal.progress)
        finally:
            # Only now, when nothing is being written any more.
            journal.close()

    def _replay(self, plan: Plan, store: Store, witness: Witness | None, journal: RunFolder | None) -> Replay:
        return Replay(self.step, self.batches, self.meta, plan, store, self.wrt_params, self.progress, witness, journal)

    def _reversed(self, replay: Replay, state: State, terms: Terms, begun: Progress | None) -> Outcome:
        num_forward = replay.evaluations
        done = replay.reverse(state, terms, begun)
        num_replayed = replay.evaluations - num_forward
        return Outcome(state, done, num_forward, num_replayed, replay.reversals, replay.store.peak_bytes)

    def _nothing_reversed(self, trial: Sequence[Term]) -> Progress:
        """Progress after the last step, as far as shapes and types go."""
        totals = [[torch.zeros_like(leaf) for leaf in floating_leaves(self.meta)] for _ in trial]
        return Progress(len(self.batches), [t.value for t in trial], [t.cotangent for t in trial], totals)

    def _rest(self, journal: RunFolder) -> Plan:
        """What is still to do, with the states that are left."""
        num_steps, left = len(self.batches), journal.store.steps
        if journal.progress is not None:
            reversed_to = journal.progress.step
        elif journal.final is not None:
            reversed_to = num_steps
        elif left:
            reversed_to = None
        else:
            return self.schedule.plan(num_steps)
        if 0 not in left and reversed_to != 0:
            # Its writing was cut off, or it is gone already and the end of the run was not noted.
            journal.store.put(Kept(self.initial, None))
            left = [0, *left]
        # The bookmarks of many processes may be left: no more states than the schedule was given.
        kept = self.schedule.thinned(left, num_steps + 1 if reversed_to is None else reversed_to)
        for step in set(left).difference(kept):
            journal.store.drop(step)
        return self.schedule.rest(num_steps, kept, reversed_to)

    def _refuse_another_step(self, witness: Witness) -> None:
        """Run step 0 and see that it does what it did for the process that began the folder."""
        if 1 not in witness.seen:
            return
        batch = self.batches[0]
        if len(self.batches) == 1:
            new = self.step.vjp(self.initial, batch, self.meta, wrt_state=self.wrt_params)[0]()
        else:
            with torch.no_grad():
                new, _ = self.step.advance(self.initial, batch, self.meta)
        try:
            witness.see(new)
        except ReplayMismatchError as error:
            raise ResumeError(
                "the folder was begun with another step: its loss, its optimizer or their settings have changed. Name "
                f"another folder, or use the step it was begun with. ({error})"
            ) from error


def fitting_store(plan: Plan, store: Store | None) -> Store:
    """`store`, or RAM; for a plan with states on disk RAM for the others.

    Raises:
        ValueError: if the plan needs a disk and `store` is none.
    """
    if not _disk_steps(plan):
        return store or RamStore()
    if not isinstance(store, DiskStore):
        raise ValueError(
            f"the schedule keeps states on disk, but `store` is {describe(store)}. Pass store=mg.DiskStore(folder), or "
            "resume=folder."
        )
    return _tiered(plan, store)


def _tiered(plan: Plan, disk: DiskStore) -> TieredStore:
    return TieredStore(RamStore(), disk, {*_disk_steps(plan), *disk.steps})


def _disk_steps(plan: Plan) -> set[int]:
    return {action.step for action in [*plan.forward, *plan.reverse] if isinstance(action, Save) and action.on_disk}


@contextmanager
def _closing(store: Store) -> Iterator[None]:
    """`store` closed at the end, so that nothing is written any more when the call is over."""
    try:
        yield
    except BaseException:
        # An error of the store is a consequence, or less urgent: the first one is told.
        with suppress(OSError):
            store.close()
        raise
    store.close()
