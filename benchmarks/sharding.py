"""Memory of a sharded run on 1, 2 and 4 processes of one machine: what docs/distributed.md shows.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py

Eight square layers in float32 with Adam, initial parameters given as `DTensor`s, a step on eight examples. Resident
memory is the most that a process has at a time, less what it has before the run (torch, its processes, a first small
run); the C library gives freed tensors back at once (docs/memory.md). P is the bytes of the parameters.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import metagrad as mg

WIDTH, DEPTH, EXAMPLES = 1536, 8, 8
P = 4 * DEPTH * WIDTH**2
RUNS = [(8, mg.EveryStep()), (16, mg.EveryStep()), (16, mg.Binomial(4))]


def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Squared outputs of a deep net."""
    hidden = batch["x"]
    for layer in params.values():
        hidden = torch.tanh(hidden @ layer)
    return hidden.square().sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help="one of the runs, on the processes that torchrun started")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    if given.case is not None:
        return measure(*RUNS[given.case])
    print(f"torch {torch.__version__}; P = {P / 1e6:.0f} MB, an Adam state {3 * P / 1e6:.0f} MB")
    print("steps  schedule      ranks  resident, largest rank  of one     kept    rest  seconds")
    for number, (num_steps, schedule) in enumerate(RUNS):
        first = None
        for processes in given.processes:
            command = ["torch.distributed.run", "--nproc-per-node", str(processes), __file__, "--case", str(number)]
            # Otherwise the C library keeps what is freed, and pieces of it stay unused.
            own = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            launch = [sys.executable, "-m", *command]
            done = subprocess.run(launch, env=own, stdout=subprocess.PIPE, text=True, check=True)
            peak, kept, seconds = map(float, done.stdout.split())
            first = first or peak
            print(
                f"{num_steps:5d}  {type(schedule).__name__:12s} {processes:6d} {peak / 1e6:20.0f} MB "
                f"{peak / first:7.0%} {kept / 1e6:5.0f} MB {(peak - kept) / P:5.1f} P {seconds:8.1f}",
                flush=True,
            )


def measure(num_steps: int, schedule: mg.Schedule) -> None:
    """Print this run's resident and kept bytes on the rank that has most, and its seconds."""
    ranks = mg.distributed.start()
    run(ranks, 64, 2, mg.EveryStep())  # What is set up once.
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The most so far is what it is now.
    start = perf_counter()
    result = run(ranks, WIDTH, num_steps, schedule)
    assert result.stats is not None
    own = resident("VmHWM") - before, result.stats.ram_bytes, perf_counter() - start
    largest = map(max, zip(*ranks.gathered(own, "the measurement"), strict=True))
    if ranks.rank == 0:
        print(*largest)


def run(ranks: mg.distributed.Ranks, width: int, num_steps: int, schedule: mg.Schedule) -> mg.Result:
    """A metagradient of example weights and the learning rate."""
    draw = torch.Generator().manual_seed(0)
    mesh = DeviceMesh.from_group(ranks.group, "cpu")

    def layer() -> Tensor:
        whole = torch.randn(width, width, generator=draw) / width**0.5
        own = whole.chunk(ranks.num_ranks)[ranks.rank].clone()
        return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)

    params = {f"layer {number}": layer() for number in range(DEPTH)}
    batches = [
        {"x": torch.randn(EXAMPLES, width, generator=draw), "index": torch.arange(EXAMPLES)} for _ in range(num_steps)
    ]
    step = mg.TrainStep(mg.weighted(loss), lambda meta: mg.optim.adam(meta["lr"], eps_root=1e-8), ranks=ranks)
    meta = {"weights": torch.ones(EXAMPLES), "lr": torch.tensor(1e-3)}
    return mg.metagradient(
        lambda state: loss(state.params, batches[0]).mean(),
        mg.distributed.Sharded(step),
        params,
        ranks.part(batches),
        meta,
        schedule=schedule,
    )


def resident(kind: str) -> int:
    """Bytes, of VmRSS now or VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
