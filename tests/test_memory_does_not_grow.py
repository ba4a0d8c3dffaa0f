"""Contract 3, measured: the memory of a process and of a disk is what was reported, and what was allowed."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from durable import forked
from torch import Tensor

import metagrad as mg

SIZE = 150_000  # float64 parameters: 1.2 MB, and as much velocity
SMALL = 40_000
M_MMAP_THRESHOLD = -3


def call(num_steps: int, schedule: Any, size: int = SIZE, several: bool = False, **options: Any) -> mg.Result:
    """A model that is all parameters: states are large, and steps cheap."""

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return batch["x"].square() * params["w"].dot(params["w"]) / size

    def metric(state: mg.State) -> Tensor:
        return state.params["w"].square().mean()

    batches = [{"index": torch.tensor([t % 3, 3]), "x": torch.tensor([0.5, 1.0 + t])} for t in range(num_steps)]
    step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(lr=0.1, momentum=0.5))
    metrics = [metric, lambda state: state.params["w"].sum()] if several else metric
    params, meta = {"w": torch.linspace(-1, 1, size)}, {"weights": torch.ones(4)}
    return mg.metagradient(metrics, step, params, batches, meta, schedule=schedule, **options)


def resident(which: str) -> int:
    """Bytes of RAM of this process: VmRSS now, VmHWM the most since it began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def measure(report: Path, num_steps: int, schedule: mg.Schedule, size: int) -> None:
    # Every tensor of size in pages of its own, given back when it is freed: otherwise it is the holes in the heap of
    # the C library that are measured, which grow with the number of steps.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16) == 1
    call(3, schedule, 1000)  # so that the code of torch is in memory before
    before = resident("VmRSS")
    result = call(num_steps, schedule, size)
    assert result.stats is not None
    report.write_text(f"{resident('VmHWM') - before} {result.stats.ram_bytes}")


def growth(tmp_path: Path, num_steps: int, schedule: mg.Schedule, size: int) -> tuple[int, int]:
    """Bytes by which a fresh process grows at most during a run, and those that were reported for kept states."""
    process = forked(measure, tmp_path / "report", num_steps, schedule, size)
    process.join()
    assert process.exitcode == 0
    grown, reported = (tmp_path / "report").read_text().split()
    return int(grown), int(reported)


of_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets glibc's heap")


@of_linux
def test_eight_slots_are_eight_slots_for_any_number_of_steps(tmp_path):
    short, reported = growth(tmp_path, 50, mg.Binomial(8), 2 * SMALL)
    long, reported_again = growth(tmp_path, 400, mg.Binomial(8), 2 * SMALL)
    assert reported == reported_again == pytest.approx(8 * 16 * 2 * SMALL, rel=0.01)
    assert long <= 1.1 * short, (long, short)


@of_linux
def test_reported_bytes_are_those_of_the_process(tmp_path):
    many, reported_many = growth(tmp_path, 30, mg.EveryStep(), SIZE)
    one, reported_one = growth(tmp_path, 30, mg.Binomial(1), SIZE)
    assert many - one == pytest.approx(reported_many - reported_one, rel=0.15), (many, one, reported_many, reported_one)


@contextmanager
def watched(folder: Path) -> Iterator[Callable[[], int]]:
    """Look at the folder all the time; gives the most bytes of files ever seen there."""
    most, over = 0, threading.Event()

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:  # renamed or removed since it was listed
            return 0

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            # The listing may hold a file under both its names: the unfinished one comes to nothing then.
            sizes = {path.name.split(".")[0]: size(path) for path in sorted(folder.glob("*"), reverse=True)}
            most = max(most, sum(sizes.values()))
            sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most
    finally:
        over.set()
        thread.join()


DISK_SCHEDULES = [mg.Binomial(6), mg.EveryStep(), mg.Tree(2), mg.Hierarchical(2, 5), mg.Hierarchical(0, 3)]


@pytest.mark.parametrize("schedule", DISK_SCHEDULES, ids=repr)
def test_bytes_on_disk_are_those_reported_and_at_most_those_estimated(schedule, tmp_path):
    with watched(tmp_path) as most:
        result = call(25, schedule, SMALL, store=mg.DiskStore(tmp_path))
    assert most() == pytest.approx(result.stats.disk_bytes, rel=0.15)
    estimate = dry_run(25, schedule, tmp_path / "other")
    assert result.stats.disk_bytes <= estimate.bytes.disk and result.stats.ram_bytes <= estimate.bytes.ram


def dry_run(num_steps: int, schedule: Any, folder: Path) -> mg.Estimate:
    """The estimate for `call` with SMALL parameters and a store in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mg, "metagradient", mg.dry_run)
        return call(num_steps, schedule, SMALL, store=mg.DiskStore(folder))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("schedule", DISK_SCHEDULES, ids=repr)
def test_bytes_in_a_folder_are_those_reported(schedule, several, tmp_path):
    with watched(tmp_path) as most:
        result = call(25, schedule, SMALL, several, resume=tmp_path)
    assert most() == pytest.approx(result.stats.disk_bytes, rel=0.15)
    if isinstance(schedule, mg.Hierarchical):
        assert result.stats.ram_bytes >= schedule.ram_slots * 16 * SMALL


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("ram, disk", [(3, 10), (5, 12), (2, 30)])
def test_a_budget_is_kept(ram, disk, in_folder, tmp_path):
    state = 16 * SMALL + 10_000  # with random numbers and names
    budget = mg.Budget(ram=ram * state, disk=disk * state)
    options = {"resume": tmp_path} if in_folder else {"store": mg.DiskStore(tmp_path)}
    with watched(tmp_path) as most:
        result = call(25, budget, SMALL, **options)
    assert most() <= budget.disk and result.stats.disk_bytes <= budget.disk and result.stats.ram_bytes <= budget.ram


def test_a_budget_of_ram_is_kept(tmp_path):
    result = call(25, mg.Budget(ram=4 * (16 * SMALL + 10_000)), SMALL)
    assert 16 * SMALL * 4 <= result.stats.ram_bytes <= 4 * (16 * SMALL + 10_000) and result.stats.disk_bytes == 0
