"""The processes of one training run, each with its part of every batch: sums over them, and what they agree on."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from operator import itemgetter
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metagrad._random import drawing, seeded
from metagrad._tree import map_tensors, tensor_leaves
from metagrad._types import Batches, Params, RankError, Tree

Answer = TypeVar("Answer")
GRACE = 5.0
"""Seconds for which the others are given time to say that they are still there, when a collective has failed."""
_runs_that_failed = count()


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that train together; made by `metagrad.distributed.start`.

    Every rank calls `metagradient` with equal arguments but for the batches, of which each has its part.

    Attributes:
        group: of torch's processes.
        timeout: seconds after which a rank that waits for the others gives up.
    """

    group: "dist.ProcessGroup"
    timeout: float

    @property
    def rank(self) -> int:
        """Which of the processes this is, from 0."""
        return dist.get_rank(self.group)

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def part(self, batches: Batches) -> Batches:
        """This rank's part of batches that every rank has whole: rows of each tensor, as evenly as they go.

        Raises:
            ValueError: when read, if a batch has fewer examples than there are ranks.
        """
        return _Parts(batches, self.rank, self.num_ranks)

    def sum(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """The sum over the ranks, tensor by tensor, the same bits on each; one collective for each type of numbers.

        Raises:
            RankError: if a rank is gone, or does not answer in time; `what` is what it was to be a sum of.
        """
        found: list[Tensor] = [tensor.detach() for tensor in tensors]
        for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in found):
            places = [i for i, tensor in enumerate(found) if (tensor.dtype, tensor.device) == kind]
            flat = torch.cat([found[i].reshape(-1) for i in places])
            with self._answering(what):
                dist.all_reduce(flat, group=self.group)
            sizes = [found[i].numel() for i in places]
            for i, piece in zip(places, flat.split(sizes), strict=True):
                found[i] = piece.view(found[i].shape)
        return found

    def broadcast(self, tensor: Tensor, rank: int, what: str) -> None:
        """Write what a rank has to the same tensor of all others.

        Raises:
            RankError: as `sum` does.
        """
        if tensor.numel():
            with self._answering(what):
                dist.broadcast(tensor, group=self.group, group_src=rank)

    def reduce(self, tensor: Tensor, rank: int, what: str) -> None:
        """Write the sum over the ranks to the tensor of one of them, and anything to those of the others.

        Raises:
            RankError: as `sum` does.
        """
        if tensor.numel():
            with self._answering(what):
                dist.reduce(tensor, group=self.group, group_dst=rank)

    def marks(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """For each tensor a 0, and a NaN where it holds a NaN or an infinity on any rank: the same on each."""
        finite = [torch.isfinite(tensor).all().to(tensors[0].device) for tensor in tensors]
        own = torch.where(torch.stack(finite), 0.0, torch.nan)
        return list(self.sum([own], what)[0])

    def count(self, number: int, device: torch.device) -> int:
        """The sum of whole numbers over the ranks."""
        return int(self.sum([torch.tensor(number, device=device)], "the numbers of examples")[0])

    def all(self, answer: bool, device: torch.device) -> bool:
        """Whether it holds on every rank."""
        return self.count(int(answer), device) == self.num_ranks

    def gathered(self, own: Any, what: str) -> list[Any]:
        """What every rank has, by rank."""
        found: list[Any] = [None] * self.num_ranks
        with self._answering(what):
            dist.all_gather_object(found, own, group=self.group)
        return found

    def first(self, own: Any, what: str) -> Any:
        """What rank 0 has."""
        return self.gathered(own, what)[0]

    def agreed(self, act: Callable[[], Answer], what: str) -> Answer:
        """What `act` returns here, once it has not failed anywhere.

        Raises:
            Exception: that of this rank's `act`; a RankError where only another's failed, with its message.
        """
        answer, error = None, None
        try:
            answer = act()
        except Exception as caught:
            error = caught
        failures = self.gathered(None if error is None else f"{type(error).__name__}: {error}", what)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RankError(f"rank {rank} could not go on with {what}: {failure}")
        return answer  # type: ignore[return-value]  # None only where `act` returned it

    def refuse_different(self, what: str, tree: Tree, marks: Callable[[Tree], Tensor]) -> None:
        """Raise on every rank if `tree`, by its digests, is not the same on all.

        Raises:
            ValueError: naming a rank that has another.
        """
        found = self.gathered(marks(tree), what)
        others = [rank for rank, each in enumerate(found) if not torch.equal(each, found[0])]
        if others:
            raise ValueError(
                f"{what} differ between rank 0 and rank {others[0]}. Every rank must be given the same: make them from "
                "one seed, or broadcast them. Only the batches differ."
            )

    @contextmanager
    def failing_aloud(self) -> Iterator[None]:
        """An error in here is told to the others, who would wait for this rank."""
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            with suppress(RuntimeError, ValueError):
                key = f"metagrad/failed/{next(_runs_that_failed)}/{self.rank}"
                dist.distributed_c10d._get_default_store().set(key, f"{type(error).__name__}: {error}")
            raise

    def own_random(self, rng: tuple[Tensor, ...], params: Params) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Random numbers of this rank's own, and the state that all ranks have in common afterwards."""
        with drawing(rng, params) as after:
            seed = int(torch.randint(2**62, (), device="cpu"))
        return seeded(seed + self.rank, params), after[0]

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # Of every backend: a peer's connection is closed, or the time is over.
            raise RankError(
                f"rank {self.rank} waited for {what} in vain: {self._missing()} ({str(error).splitlines()[0]})"
            ) from error

    def _missing(self) -> str:
        """Who does not say that it is still there."""
        number = next(_runs_that_failed)
        name, failed = f"metagrad/alive/{number}/{{}}".format, f"metagrad/failed/{number}/{{}}".format
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(name(self.rank), str(os.getpid()))
            store.set_timeout(timedelta(seconds=GRACE))
            for rank in range(self.num_ranks):
                if store.check([failed(rank)]):
                    return f"rank {rank} failed with {store.get(failed(rank)).decode()}"
            silent = [str(rank) for rank in range(self.num_ranks) if not _there(store, name(rank))]
        except (RuntimeError, ValueError):  # The process that held it is gone.
            return "the process that brings the ranks together has ended, which is rank 0's or the launcher's"
        if not silent:
            return "every rank is still there, but one did not take part in time"
        have = "has ended or does not answer" if len(silent) == 1 else "have ended or do not answer"
        return f"rank {' and rank '.join(silent)} {have}"


def _there(store: Any, key: str) -> bool:
    try:
        store.wait([key])
    except (RuntimeError, ValueError) as error:
        if "imeout" not in str(error) and "imed out" not in str(error):
            raise
        return False
    return True


@dataclass(frozen=True)
class _Parts:
    """One rank's rows of each batch."""

    batches: Batches
    rank: int
    num_ranks: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Tree:
        batch = self.batches[step]
        sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensor_leaves(batch)}
        size = min(sizes, default=0)
        if len(sizes) != 1 or size < self.num_ranks:
            raise ValueError(
                f"batch {step} cannot be divided among {self.num_ranks} ranks: its tensors have {sorted(sizes)} "
                "entries along the first axis. Give all as many as there are examples, and each rank at least one."
            )
        start, stop = (size * rank // self.num_ranks for rank in (self.rank, self.rank + 1))
        return map_tensors(itemgetter(slice(start, stop)), batch)
