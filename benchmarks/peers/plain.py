"""Plain training by torch.optim, which everything is compared with, and the gradient of the metric alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.attempt import Attempt, Clock, pieces
from benchmarks.peers.cases import LR, WEIGHT_DECAY, Case
from benchmarks.peers.tasks import Batch, Task


def plain(task: Task, case: Case) -> Attempt:
    """Training alone, eager."""
    return _training(task, case, task.losses)


def plain_compiled(task: Task, case: Case) -> Attempt:
    """Training alone; torch.compile makes the loss and its gradient."""
    return _training(task, case, torch.compile(task.losses))


def metric_alone(task: Task, case: Case) -> Attempt:
    """The metric and its gradient at the initial parameters."""

    def attempt(clock: Clock) -> None:
        params = task.initial()
        with clock:
            torch.autograd.grad(task.metric(params), list(params.values()))

    return attempt


def _training(task: Task, case: Case, losses: Callable[[dict[str, Tensor], Batch], Tensor]) -> Attempt:
    def attempt(clock: Clock) -> None:
        params = task.initial()
        with clock:
            if case.optimizer == "adamw":
                optimizer = torch.optim.AdamW(params.values(), lr=LR, weight_decay=WEIGHT_DECAY)
            else:
                optimizer = torch.optim.SGD(params.values(), lr=LR)
            for batch in task.batches:
                optimizer.zero_grad()
                for piece in pieces(batch, case.num_pieces):
                    (losses(params, piece).sum() / task.batch_size).backward()
                optimizer.step()

    return attempt
