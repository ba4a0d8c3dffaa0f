"""A run over several processes is the run of one; and no process waits in vain for one that has ended."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from durable import SETUPS, call, forked, loss, same, tensors
from torch.distributed.tensor import DTensor

import metagrad as mg
from metagrad import _ranks, _resume

HERE = Path(__file__).parent
NUM_STEPS = 30
KINDS = [(2, False), (3, False), (3, True)]  # numbers of ranks, and whether their state is sharded


@pytest.mark.parametrize(
    "file, num_ranks, chosen",
    [
        ("over_ranks.py", 2, "mlp or llama or not gradients"),
        ("over_ranks.py", 4, "mlp or not gradients"),
        ("over_ranks_sharded.py", 2, "(mlp and (adamw or clipped or groups)) or not gradients"),
        ("over_ranks_sharded.py", 4, "(mlp and adamw) or not gradients"),
        ("over_ranks_recut.py", 4, ""),
    ],
)
def test_the_exactness_table(file, num_ranks, chosen):
    """Most of it: `nox -s ranks` runs all."""
    command = ["torch.distributed.run", "--nproc-per-node", str(num_ranks), "--module", "pytest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-m", *command, str(HERE / file), "-q", "-k", chosen, "-p", "no:cacheprovider"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def one_of(rank: int, num_ranks: int, place: Path, name: str, pause: float, sharded: bool) -> None:
    """One rank of a run that resumes in `place`; leaves its results there, or what went wrong and when."""
    _ranks.GRACE, _resume.PAUSE = 0.5, pause
    dist.init_process_group("gloo", init_method=f"file://{place}/{name}", rank=rank, world_size=num_ranks)
    try:
        ranks = mg.distributed.start(timeout=20)
        (place / f"{name}-met-{rank}").touch()
        step = mg.TrainStep(mg.weighted(loss), mg.optim.adamw(lr=0.02), ranks=ranks)
        step = mg.distributed.Sharded(step) if sharded else step
        result = call(SETUPS["binomial"], NUM_STEPS, ranks=ranks, step=step, resume=place / "run")
        results = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors(result)]
    except BaseException as error:
        (place / f"{name}-error-{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    torch.save(results, place / f"results-{rank}")
    os._exit(0)  # A group is not left in order, so that one rank does not wait for another here.


def start(num_ranks: int, place: Path, name: str, pause: float = 0.0, sharded: bool = False) -> list:
    place.mkdir(exist_ok=True)
    return [forked(one_of, rank, num_ranks, place, name, pause, sharded) for rank in range(num_ranks)]


def finish(processes: list, seconds: float = 60) -> list[int]:
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of each rank of an uninterrupted run, by the number of ranks and whether it is sharded."""
    found = {}
    for num_ranks, sharded in KINDS:
        place = tmp_path_factory.mktemp("whole")
        assert finish(start(num_ranks, place, "only", sharded=sharded)) == [0] * num_ranks
        found[num_ranks, sharded] = [torch.load(place / f"results-{rank}") for rank in range(num_ranks)]
    return found


@pytest.mark.parametrize("num_ranks, sharded", KINDS)
def test_ten_kills_of_any_rank_change_no_bit(num_ranks, sharded, uninterrupted, tmp_path):
    draw = random.Random(num_ranks)
    cut_off = 0
    for number in range(10):
        processes = start(num_ranks, tmp_path, f"attempt-{number}", sharded=sharded)
        while len(list(tmp_path.glob(f"attempt-{number}-met-*"))) < num_ranks:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.25))
        victim = draw.randrange(num_ranks)
        os.kill(processes[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        codes = finish(processes, 20)
        assert time.monotonic() - began < 10, "a rank waited for one that was dead"
        if codes == [0] * num_ranks or codes[victim] == 0:
            continue  # It was over before.
        cut_off += 1
        for rank in set(range(num_ranks)) - {victim}:
            if codes[rank] != 0:
                message = (tmp_path / f"attempt-{number}-error-{rank}").read_text()
                # Where rows go from rank to rank another may wait for this one, and not answer either.
                assert re.match(rf"RankError: .*\brank {victim} (and rank \d )?ha(s|ve) ended", message), message
    assert cut_off >= 5
    assert finish(start(num_ranks, tmp_path, "last", sharded=sharded)) == [0] * num_ranks
    for rank in range(num_ranks):
        assert same(torch.load(tmp_path / f"results-{rank}"), uninterrupted[num_ranks, sharded][rank])


def test_a_rank_that_hangs_is_named_in_time(tmp_path):
    """A stopped process holds its connections: only the time limit, of 20 seconds, ends the wait."""
    processes = start(2, tmp_path, "hanging", pause=10)
    while not (tmp_path / "run" / "rank-1-of-2").exists():
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(40)
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].join()
    assert processes[0].exitcode == 1
    assert "rank 1 has ended or does not answer" in (tmp_path / "hanging-error-0").read_text()


def unreadable(rank: int, place: Path) -> None:
    """A run of two in which the second rank cannot read its last batch, and does not end."""
    _ranks.GRACE = 0.5
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    ranks = mg.distributed.start(timeout=5)

    class Batches:
        def __len__(self):
            return 3

        def __getitem__(self, step):
            if rank == 1 and step == 2 and read:
                raise OSError("the disk is on fire")
            read.extend([step] if step == 2 else [])
            return {"x": torch.ones(2, 2), "index": torch.arange(2)}

    read: list[int] = []
    step = mg.TrainStep(mg.weighted(lambda p, batch: batch["x"] @ p["w"]), mg.optim.sgd(lr=0.1), ranks=ranks)
    try:
        mg.metagradient(
            lambda state: state.params["w"].sum(), step, {"w": torch.ones(2)}, Batches(), {"weights": torch.ones(2)}
        )
    except Exception as error:
        (place / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    time.sleep(3 if rank == 1 else 0)
    os._exit(0)


def test_the_message_of_a_rank_that_failed_reaches_the_others(tmp_path):
    assert finish([forked(unreadable, rank, tmp_path) for rank in range(2)]) == [0, 0]
    assert (tmp_path / "error-1").read_text() == "OSError: the disk is on fire"
    assert "rank 1 failed with OSError: the disk is on fire" in (tmp_path / "error-0").read_text()


def test_files_of_one_rank_that_are_lost_cost_the_others_nothing(tmp_path):
    assert finish(start(2, tmp_path, "whole")) == [0, 0]
    left = {path.name for path in (tmp_path / "run" / "rank-0-of-2").iterdir()}
    (tmp_path / "run" / "rank-1-of-2").rename(tmp_path / "elsewhere")
    assert finish(start(2, tmp_path, "again")) == [1, 1]
    for rank in range(2):
        assert "rank 1 has no files of this run" in (tmp_path / f"again-error-{rank}").read_text()
    assert {path.name for path in (tmp_path / "run" / "rank-0-of-2").iterdir()} == left


def test_another_number_of_ranks_is_refused(tmp_path):
    assert finish(start(2, tmp_path, "two")) == [0, 0]
    assert finish(start(3, tmp_path, "three")) == [1, 1, 1]
    for rank in range(3):
        message = (tmp_path / f"three-error-{rank}").read_text()
        assert "begun with another number of ranks than 3" in message


def test_alone_there_is_nobody_to_start_with():
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        mg.distributed.start()
    with pytest.raises(ValueError, match="`timeout` is 0"):
        mg.distributed.start(timeout=0)
