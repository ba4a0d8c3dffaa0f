"""What a metagradient will cost, measured on its first step; and the schedule that fits a budget of bytes."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

from metagrad._disk import DiskStore
from metagrad._files import Blueprint, read_tree, write_tree
from metagrad._hierarchy import Hierarchical
from metagrad._plan import Cost, Load, Save
from metagrad._run import Run
from metagrad._schedule import Binomial, Schedule
from metagrad._store import Bytes, Kept, Store
from metagrad._tree import independent, num_bytes
from metagrad._types import Term

COPIES = 2
"""States in RAM besides the kept ones while a disk is used: one being written, one read ahead."""


@dataclass(frozen=True)
class Budget:
    """The cheapest schedule within so many bytes for kept states, chosen after measuring one step.

    With RAM alone that is `Binomial`; with a disk `Hierarchical`, planned from the seconds that a step, writing a state
    and reading one take here. The numbers of a metagradient do not depend on what is chosen.

    Args:
        ram: bytes for kept states in RAM (on a GPU: where the `store` keeps them).
        disk: bytes for kept states on disk.

    Raises:
        ValueError: before training, if not even the initial state fits.
    """

    ram: int
    disk: int = 0

    def __post_init__(self) -> None:
        if self.ram < 0 or self.disk < 0 or self.ram + self.disk == 0:
            raise ValueError(f"the budget is {self.ram} bytes of RAM and {self.disk} of disk. Pass bytes above 0.")


class Measured(NamedTuple):
    """One step of a run: bytes of a kept state in RAM and as a file; seconds of a step, its reversal and copying."""

    state_bytes: int
    file_bytes: int
    step: float
    reversal: float
    write: float
    read: float


class Estimate(NamedTuple):
    """What a metagradient will cost; prints as a report.

    Attributes:
        schedule: the one given, or the one that a `Budget` chose.
        cost: step evaluations and kept states.
        bytes: the most bytes of kept states at a time.
        measured: of the first step.
        seconds: of the whole, extrapolated; copying overlaps with steps and is counted in full.
    """

    schedule: Schedule
    cost: Cost
    bytes: Bytes
    measured: Measured
    seconds: float

    def __str__(self) -> str:
        cost, measured = self.cost, self.measured
        return "\n".join(
            [
                f"schedule      {self.schedule}",
                f"evaluations   {cost.forward} forward, {cost.replayed} replayed, {cost.reversed} reversed",
                f"one step      {measured.step:.3g} s; its reversal {measured.reversal:.3g} s",
                f"one state     {_readable(measured.state_bytes)}; {cost.states} kept at a time",
                f"kept states   {_readable(self.bytes.ram)} in RAM, {_readable(self.bytes.disk)} on disk",
                f"in all about  {self.seconds:.3g} s",
            ]
        )


def within(budget: Budget, measured: Measured, has_folder: bool, spare: int) -> Schedule:
    """The schedule that a budget allows.

    Args:
        has_folder: whether there is a place on disk.
        spare: bytes that must fit on the disk besides the kept states.

    Raises:
        ValueError: if the budget is too small, or has bytes on disk and no place there.
    """
    size = measured.state_bytes
    if budget.disk == 0:
        if budget.ram < size:
            raise ValueError(f"a budget of {budget.ram} bytes of RAM holds no state of {size} bytes. Raise it.")
        return Binomial(int(budget.ram // size))
    if not has_folder:
        raise ValueError("the budget has bytes on disk, but no folder is named. Pass store=mg.DiskStore(folder).")
    ram = int(budget.ram // size) - COPIES
    disk = int((budget.disk - spare) // measured.file_bytes)
    if ram < 0 or disk < 1:
        raise ValueError(
            f"a budget of {budget.ram} bytes of RAM and {budget.disk} of disk is too small for states of {size} bytes: "
            f"RAM must hold {COPIES} for copying, and the disk one and {spare} bytes. Raise it, or use RAM alone."
        )
    return Hierarchical(ram, disk, measured.write / measured.step, measured.read / measured.step)


def measure(run: Run, folder: str | os.PathLike[str] | None, trial: Sequence[Term]) -> Measured:
    """One step of `run`, its reversal, and one state to disk and back where a `folder` is named.

    Cost: two evaluations and two reversals of step 0.
    """
    batch = run.batches[0]
    for _ in range(2):  # The first time also pays for what torch sets up once.
        start = perf_counter()
        with torch.no_grad():
            state, extra = run.step.advance(run.initial, batch, run.meta)
        stepped = perf_counter()
        _, pull = run.step.vjp(run.initial, batch, run.meta, wrt_state=True, kept=extra)
        pull(independent([term.cotangent for term in trial]))
        seconds = stepped - start, perf_counter() - stepped
    kept = Kept(state, extra)
    file_bytes, write, read = (0, 0.0, 0.0) if folder is None else _copying(kept, Path(folder))
    return Measured(num_bytes(kept), file_bytes, *seconds, write, read)


def estimated(run: Run, measured: Measured, store: Store | None) -> Estimate:
    """The cost of `run`, from the measurement of one step."""
    plan = run.schedule.plan(len(run.batches))
    cost = plan.cost
    on_disk = cost.states if isinstance(store, DiskStore) and cost.on_disk == 0 else cost.on_disk
    in_ram = cost.states - on_disk + (COPIES if on_disk else 0)
    actions = [*plan.forward, *plan.reverse]
    files = {a.step for a in actions if isinstance(a, Save) and (a.on_disk or on_disk == cost.states)}
    copying = len(files) * measured.write
    copying += sum(isinstance(a, Load) and a.step in files for a in actions) * measured.read
    steps = (cost.forward + cost.replayed) * measured.step + cost.reversed * measured.reversal
    return Estimate(
        run.schedule,
        cost,
        Bytes(in_ram * measured.state_bytes, on_disk * measured.file_bytes),
        measured,
        steps + copying,
    )


def _copying(kept: Kept, folder: Path) -> tuple[int, float, float]:
    """Bytes of a state's file, and seconds to write and to read it."""
    # Beside the folder: what a kill leaves there must not be in the way of a run that goes on.
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix="metagrad-") as place:
        start = perf_counter()
        path = write_tree(Path(place), "measured", kept)
        written = perf_counter()
        read_tree(path, Blueprint.of(kept))
        return path.stat().st_size, written - start, perf_counter() - written


def _readable(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
