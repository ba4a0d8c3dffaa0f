"""Training again without some examples, on several processes, in a folder that outlives them."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metagrad._claim import claim, locked
from metagrad._custom import as_linear
from metagrad._files import Blueprint, read_tree, write_tree
from metagrad._fingerprint import Fingerprint, digest, fingerprint
from metagrad._metric import Objective, Trajectory, value_of
from metagrad._progress import ticking
from metagrad._types import Batches, LinearStep, Metric, NonFiniteError, State, Step, Tree
from metagrad.attribution._scores import like_params, refuse_other_subsets, refuse_weights


def random_subsets(
    num_examples: int, fraction: float, num_subsets: int, seed: int = 0
) -> Bool[Tensor, "subsets examples"]:
    """`num_subsets` random sets of round(fraction · num_examples) examples each, True where an example is left out.

    Raises:
        ValueError: if the subsets would be empty or everything, or there are none.
    """
    size = round(fraction * num_examples)
    if not 0 < size < num_examples or num_subsets < 1:
        raise ValueError(
            f"`fraction` {fraction} of {num_examples} examples is {size}, in {num_subsets} subsets. Leave out at least "
            "one example and not all, in one subset or more."
        )
    generator = torch.Generator().manual_seed(seed)
    removed = torch.zeros(num_subsets, num_examples, dtype=torch.bool)
    for row in removed:
        row[torch.randperm(num_examples, generator=generator)[:size]] = True
    return removed


def retrain(
    metrics: Sequence[Metric | Trajectory],
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    removed: Bool[Tensor, "subsets examples"],
    *,
    meta: Mapping[str, Tree] | None = None,
    processes: int = 1,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Float[Tensor, "queries subsets"]:
    """Every metric after training with weight 0 on each subset: the same steps, batches, order and random numbers.

    Args:
        metrics, step, params, batches, meta: as for `scores`.
        removed: True where an example is left out.
        processes: how many subsets are trained at a time. More than one are forked, with one torch thread each.
        resume: a folder where the result of each subset is kept as soon as it is known.
        progress: show a bar in subsets.

    Raises:
        ValueError: for subsets that do not fit, or processes that cannot be forked.
        ResumeError: if the folder is damaged, of another run or in use.
        RuntimeError: if a process fails, with what it said.

    Cost: one training run for each subset.
    """
    objective = Objective.of(list(metrics), len(batches))
    refuse_other_subsets(removed, removed.shape[-1])
    like = like_params(params)
    _refuse_processes(processes, like["device"])
    run = Retraining(
        objective, as_linear(step), params, batches, dict(refuse_weights(meta)), (~removed).to(**like), processes
    )
    run.step.validate(batches, run.meta_without(0))
    folder = None if resume is None else SubsetFolder(resume, run)
    found = {} if folder is None else folder.found()
    missing = [subset for subset in range(len(removed)) if subset not in found]
    try:
        with ticking("retrain", "subset", len(removed), progress, done=len(found)) as tick:
            for subset, values in run.each(missing, None if folder is None else folder.close):
                if folder is not None:
                    folder.keep(subset, values)
                found[subset] = values
                tick()
    finally:
        if folder is not None:
            folder.close()
    return torch.stack([found[subset] for subset in range(len(removed))], dim=1)


@dataclass(frozen=True)
class Retraining:
    """Training without each of several subsets; `weights` has one row for each."""

    objective: Objective
    step: LinearStep
    params: Mapping[str, Tensor] | nn.Module | State
    batches: Batches
    meta: Mapping[str, Tree]
    weights: Float[Tensor, "subsets examples"]
    processes: int

    def meta_without(self, subset: int) -> Tree:
        """The metaparameters of the run without this subset."""
        return {**self.meta, "weights": self.weights[subset]}

    def values(self, subset: int) -> Float[Tensor, " queries"]:
        """Every metric after training without this subset, in float64.

        Raises:
            NonFiniteError: if one is NaN or infinite.
        """
        meta = self.meta_without(subset)
        state = self.step.init(self.params, meta)
        values = torch.zeros(len(self.objective.terms), dtype=torch.float64)
        for t in range(len(self.batches) + 1):
            for query, steps in enumerate(self.objective.terms):
                if t in steps:
                    values[query] += value_of(steps[t], state).detach().double().cpu()
            if t < len(self.batches):
                with torch.no_grad():
                    state, _ = self.step.advance(state, self.batches[t], meta)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"a metric is not finite after training without subset {subset}: {values.tolist()}.")
        return values

    def each(self, subsets: Sequence[int], in_child: Callable[[], None] | None) -> Iterator[tuple[int, Tensor]]:
        """Every subset with its values, in the order in which they are known; `in_child` is called in each process."""
        if self.processes == 1:
            yield from ((subset, self.values(subset)) for subset in subsets)
            return
        context = multiprocessing.get_context("fork")  # Losses are often closures, which no other way can pass on.
        workers: dict[Connection, BaseProcess] = {}
        try:
            for number in range(self.processes):
                receiver, sender = context.Pipe(duplex=False)
                worker: BaseProcess = context.Process(
                    target=self._work, args=(subsets[number :: self.processes], sender, in_child), daemon=True
                )
                worker.start()
                sender.close()
                workers[receiver] = worker
            yield from _received(workers)
        finally:
            for worker in workers.values():
                worker.terminate()
                worker.join()

    def _work(self, subsets: Sequence[int], sender: Connection, in_child: Callable[[], None] | None) -> None:
        if in_child is not None:
            in_child()  # Or the folder would stay locked for as long as this process outlives a killed parent.
        # One thread: more would spin against those of the other processes, and OpenMP's do not survive a fork.
        torch.set_num_threads(1)
        try:
            for subset in subsets:
                sender.send((subset, self.values(subset).tolist()))
            sender.send(None)
        except BaseException:
            sender.send(traceback.format_exc())


def _received(workers: Mapping[Connection, BaseProcess]) -> Iterator[tuple[int, Tensor]]:
    """What the workers send until each is done.

    Raises:
        RuntimeError: if one fails or dies.
    """
    waiting = set(workers)
    while waiting:
        for receiver in wait(list(waiting)):
            assert isinstance(receiver, Connection)
            try:
                message = receiver.recv()
            except EOFError:
                code = workers[receiver].exitcode
                raise RuntimeError(f"a retraining process died (exit status {code}). Try fewer `processes`.") from None
            if isinstance(message, str):
                raise RuntimeError(f"a retraining process failed:\n{message}")
            if message is None:
                waiting.remove(receiver)
                continue
            subset, values = message
            yield subset, torch.tensor(values, dtype=torch.float64)


class SubsetFolder:
    """The values of finished subsets, a checksummed file each.

    Raises:
        ResumeError: if the folder is of another run, or in use.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Retraining) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._like = Blueprint.of(torch.zeros(len(run.objective.terms), dtype=torch.float64))
        self._lock = locked(self.folder)
        try:
            claim(self.folder, _fingerprint(run))
        except BaseException:
            self.close()
            raise

    def found(self) -> dict[int, Tensor]:
        """The values that are there, by subset.

        Raises:
            ResumeError: if a file is damaged.
        """
        paths = {
            int(path.name[len("subset-") :].split(".")[0]): path for path in self.folder.glob("subset-*.safetensors")
        }
        return {subset: read_tree(path, self._like) for subset, path in paths.items()}

    def keep(self, subset: int, values: Tensor) -> None:
        """Write the values of a subset, durably."""
        write_tree(self.folder, f"subset-{subset:06d}", values)

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)


def _fingerprint(run: Retraining) -> Fingerprint:
    meta = {**run.meta, "weights": run.weights}
    initial = run.step.init(run.params, run.meta_without(0))
    with torch.no_grad():
        first, _ = run.step.advance(initial, run.batches[0], run.meta_without(0))
    return {
        **fingerprint(initial, run.batches, meta, run.objective.marks(initial), wrt_params=False),
        "state after the first step": digest(first),
        "number of threads": str(torch.get_num_threads() if run.processes == 1 else 1),
    }


def _refuse_processes(processes: int, device: torch.device) -> None:
    if processes < 1:
        raise ValueError(f"`processes` is {processes}. Pass 1 or more.")
    if processes > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(
            "this system cannot fork processes, and losses cannot be passed on otherwise. Pass processes=1."
        )
    if processes > 1 and device.type != "cpu":
        raise ValueError(f"the parameters are on {device}, and CUDA does not survive a fork. Pass processes=1.")
