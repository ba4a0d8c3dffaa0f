"""bergson's MAGIC trainer, driven as its own command line does: train, gradient of the query, backward."""

from copy import deepcopy
from tempfile import TemporaryDirectory

import torch
import torchopt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.attempt import Attempt, Clock
from benchmarks.peers.cases import EPS_ROOT, LR, WEIGHT_DECAY, Case
from benchmarks.peers.tasks import Batch, Task

# Its "log" is the nearest to a fixed number of slots: about log2(T) states, and more while it replays.
SAVE_MODES = {"all": "all", "sqrt": "sqrt", "8 slots": "log"}


class WeightedMean(nn.Module):
    """The loss that the trainer asks a model for: the mean over the examples of weight times loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor, example_weight: Tensor, shift_loss_mask: Tensor) -> Tensor:
        return (example_weight * self.module(x, y)).mean()


class Stream:
    """What the trainer reads of bergson's own data stream, without its copies from lists of tokens."""

    def __init__(self, task: Task) -> None:
        self.batches, self.device = task.batches, task.device
        self.weights = nn.Parameter(task.weights())

    @property
    def requires_grad(self) -> bool:
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        batch = self.batches[step]
        return _inputs(batch, self.weights[batch["index"]])


def _inputs(batch: Batch, weights: Tensor) -> Batch:
    # A micro-batch counts by its entries of this mask: here by its examples.
    mask = torch.ones_like(batch["index"], dtype=torch.bool)
    return {"x": batch["x"], "y": batch["y"], "example_weight": weights, "shift_loss_mask": mask}


def bergson_magic(task: Task, case: Case) -> Attempt:
    """Forward states on disk, as its trainer keeps them, and those of a replay in RAM."""
    from bergson.magic.grad_accum import accumulate_grads
    from bergson.magic.trainer import BackwardState, Trainer

    if case.optimizer == "adamw":
        optimizer = torchopt.adamw(LR, eps_root=EPS_ROOT, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torchopt.sgd(LR)
    mode, same = SAVE_MODES[case.kept], {"inplace": True, "grad_accum_steps": case.num_pieces}
    query = _inputs(task.held_out, torch.ones(len(task.held_out["index"]), device=task.device))

    def attempt(clock: Clock) -> Tensor:
        # The trainer moves the model that it is given to the meta device.
        model, stream = WeightedMean(deepcopy(task.module)), Stream(task)
        with TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH), clock:
            trainer, state = Trainer.initialize(model, optimizer)
            state = trainer.train(state, stream, save_dir=folder, save_mode=mode, **same)
            with state.activate(model) as params:
                gradient, _ = accumulate_grads(model, params, query, 1, create_graph=False)
            memory = [
                torch.zeros_like(leaf)
                for leaf in torchopt.pytree.tree_iter(state.opt_state)
                if isinstance(leaf, Tensor) and leaf.is_floating_point()
            ]
            stream.requires_grad = True
            cotangents = BackwardState(gradient, memory, torch.zeros_like(stream.weights))
            cotangents = trainer.backward(folder, stream, cotangents, state, save_mode=mode, **same)
        return cotangents.weight_grads

    return attempt
