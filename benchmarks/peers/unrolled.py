"""TorchOpt and higher: autograd through all steps at once, so every step's graph is kept whatever the case says."""

from collections.abc import Callable

import torch
import torchopt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.attempt import Attempt, Clock, pieces
from benchmarks.peers.cases import EPS_ROOT, LR, WEIGHT_DECAY, Case
from benchmarks.peers.tasks import Batch, Task


def torchopt_unrolled(task: Task, case: Case) -> Attempt:
    """TorchOpt's functional optimizers."""
    if case.optimizer == "adamw":
        optimizer = torchopt.adamw(LR, eps_root=EPS_ROOT, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torchopt.sgd(LR)

    def attempt(clock: Clock) -> Tensor:
        params, weights = task.initial(), task.weights().requires_grad_()
        # The other kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), clock:
            state = optimizer.init(params)
            for batch in task.batches:
                gradient = _gradient(task, case, params, batch, weights)
                updates, state = optimizer.update(gradient, state, params=params, inplace=False)
                params = torchopt.apply_updates(params, updates, inplace=False)
            (gradient,) = torch.autograd.grad(task.metric(params), [weights])
        return gradient

    return attempt


def _gradient(task: Task, case: Case, params: dict[str, Tensor], batch: Batch, weights: Tensor) -> dict[str, Tensor]:
    loss = _loss(lambda piece: task.losses(params, piece), case, batch, weights)
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))


def higher_unrolled(task: Task, case: Case) -> Attempt:
    """higher's functional copy of the module and of torch's optimizer.

    Raises:
        ValueError: for Adam, which is another one there.
    """
    import higher

    if case.optimizer != "sgd":
        raise ValueError("higher 0.2.1 has no `eps_root`: its Adam would train another run")

    def attempt(clock: Clock) -> Tensor:
        weights = task.weights().requires_grad_()
        optimizer = torch.optim.SGD(task.module.parameters(), lr=LR)
        with sdpa_kernel(SDPBackend.MATH), clock:
            with higher.innerloop_ctx(task.module, optimizer) as (module, differentiable):
                for batch in task.batches:
                    loss = _loss(lambda piece: module(piece["x"], piece["y"]), case, batch, weights)
                    differentiable.step(loss)
                metric = module(task.held_out["x"], task.held_out["y"]).mean()
                (gradient,) = torch.autograd.grad(metric, [weights])
        return gradient

    return attempt


def _loss(losses: Callable[[Batch], Tensor], case: Case, batch: Batch, weights: Tensor) -> Tensor:
    """The mean of weight times loss over `batch`, micro-batch by micro-batch."""
    shares = [(weights[piece["index"]] * losses(piece)).sum() for piece in pieces(batch, case.num_pieces)]
    return torch.stack(shares).sum() / len(batch["index"])
