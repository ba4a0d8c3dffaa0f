"""One run under several schedules and stores: what docs/schedules.md shows.

    OMP_NUM_THREADS=1 python benchmarks/schedules.py

100 steps of the multilayer perceptron of benchmarks/cost.py with Adam. Seconds are ratios to plain training, medians of
three pairs; `unit` counts step evaluations before the reversals, for each step.
"""

import tempfile
from statistics import median

import torch
from cost import LR, Case, mlp, seconds, step_of, train_plainly

import metagrad as mg

NUM_STEPS, REPEATS = 100, 3
IN_RAM = [mg.EveryStep(), mg.Binomial(20), mg.Binomial(10), mg.Binomial(5), mg.Binomial(2), mg.Tree(2), mg.Tree(5)]
ON_DISK = [mg.EveryStep(), mg.Binomial(10), mg.Hierarchical(4, 6), mg.Hierarchical(2, 18), mg.Budget(50_000_000, 10**9)]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Adam at {LR}")
    task = mlp()
    case = Case(NUM_STEPS, mg.EveryStep())
    step, meta = step_of(task, case), {"weights": torch.ones(len(task.batch["index"]))}

    def run(schedule: mg.Schedule | mg.Budget, store: mg.Store | None) -> mg.Result:
        def metric(state: mg.State) -> torch.Tensor:
            return task.losses(state.params, task.batch).mean()

        batches = [task.batch] * NUM_STEPS
        return mg.metagradient(metric, step, task.model, batches, meta, schedule=schedule, store=store)

    reference = run(mg.EveryStep(), None).meta["weights"]
    print("schedule                                    store  evaluations   ratio      RAM     disk  same bits")
    for on_disk, schedules in (False, IN_RAM), (True, ON_DISK):
        for schedule in schedules:
            ratios = []
            for _ in range(REPEATS):
                plain = seconds(lambda: train_plainly(task, case))
                with tempfile.TemporaryDirectory() as folder:
                    result = run(schedule, mg.DiskStore(folder) if on_disk else None)
                ratios.append(result.stats.seconds / plain)
            stats = result.stats
            same = torch.equal(result.meta["weights"], reference)
            print(
                f"{str(schedule)[:42]:42s} {'disk' if on_disk else 'RAM':>6s} {stats.forward + stats.replayed:12d} "
                f"{median(ratios):7.1f} {stats.ram_bytes / 1e6:5.0f} MB {stats.disk_bytes / 1e6:5.0f} MB  {same}",
                flush=True,
            )


if __name__ == "__main__":
    main()
