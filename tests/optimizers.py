"""The optimizers that every claim is tested on, and the one of torch that each must equal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

import metagrad as mg

# Large enough that Adam is smooth on the scale of a finite difference.
SMOOTH = {"betas": (0.8, 0.95), "eps": 1e-6, "eps_root": 1e-3}


def by_shape(name: str, tensor: Tensor) -> str:
    """The rule of the groups below."""
    return "matrix" if tensor.ndim == 2 else "vector"


def muon() -> GradientTransformation:
    return mg.optim.muon(lr=0.02, weight_decay=0.1, others=mg.optim.adamw(lr=0.02, **SMOOTH))


def grouped() -> GradientTransformation:
    momentum, adam = mg.optim.sgd(lr=0.05, momentum=0.8, weight_decay=0.1), mg.optim.adam(lr=0.02, **SMOOTH)
    return mg.optim.groups(by_shape, {"matrix": momentum, "vector": adam})


def falling(step: int) -> float:
    """A learning rate that depends on the step."""
    return 0.1 / (step + 1)


# The ones that every problem is trained with.
CORE = {
    "sgd": lambda: mg.optim.sgd(lr=0.1),
    "momentum": lambda: mg.optim.sgd(lr=0.05, momentum=0.8),
    "nesterov": lambda: mg.optim.sgd(lr=0.05, momentum=0.8, nesterov=True),
    "adam": lambda: mg.optim.adam(lr=0.02, **SMOOTH),
    "adamw": lambda: mg.optim.adamw(lr=0.02, weight_decay=0.1, **SMOOTH),
}
BUILDERS: dict[str, Callable[[], GradientTransformation]] = {
    **CORE,
    "dampened": lambda: mg.optim.sgd(lr=0.05, momentum=0.8, dampening=0.3),
    "decay": lambda: mg.optim.sgd(lr=0.05, momentum=0.8, weight_decay=0.1),
    "muon": muon,
    "groups": grouped,
    "schedule": lambda: mg.optim.sgd(lr=falling, momentum=lambda step: 0.5 + 0.1 * min(step, 4)),
    "clipped": lambda: torchopt.chain(mg.optim.clip(0.1), mg.optim.adam(lr=0.02, **SMOOTH)),
    "torchopt adam": lambda: torchopt.adam(lr=0.02, betas=(0.8, 0.95), eps_root=1e-3),
    "torchopt adamw": lambda: torchopt.adamw(lr=falling, eps_root=1e-3, weight_decay=0.1),
    "torchopt rmsprop": lambda: torchopt.rmsprop(lr=0.02, initial_scale=0.1),
    "torchopt adagrad": lambda: torchopt.adagrad(lr=0.05, initial_accumulator_value=0.1),
    "torchopt adadelta": lambda: torchopt.adadelta(lr=0.5, eps=1e-3),
}
OPTIMIZERS = {name: build() for name, build in CORE.items()}
ALL_OPTIMIZERS = {name: build() for name, build in BUILDERS.items()}


class Both:
    """Two optimizers of torch as one, or an optimizer and its scheduler."""

    def __init__(self, *optimizers: torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def split(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices, and the rest."""
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]


def torch_muon(params: list[Tensor], **options) -> Both:
    matrices, rest = split(params)
    return Both(torch.optim.Muon(matrices, 0.02, **options), torch.optim.AdamW(rest, 0.01, weight_decay=0.0))


def our_muon(**options) -> GradientTransformation:
    return mg.optim.muon(0.02, others=mg.optim.adamw(0.01, eps_root=TINY), **options)


def torch_groups(params: list[Tensor]) -> torch.optim.Optimizer:
    matrices, rest = split(params)
    return torch.optim.AdamW(
        [{"params": matrices, "lr": 0.03, "weight_decay": 0.2}, {"params": rest, "betas": (0.5, 0.9)}],
        lr=0.01,
        weight_decay=0.0,
    )


def scheduled(params: list[Tensor]) -> Both:
    optimizer = torch.optim.SGD(params, 0.1, 0.9)
    return Both(optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=4))


@dataclass(frozen=True)
class Twins:
    """One optimizer, ours and torch's."""

    ours: GradientTransformation
    torch: Callable[[list[Tensor]], torch.optim.Optimizer | Both]
    rtol: float = 1e-12


# torch has no eps_root. At 1e-24 it changes √v by less than rounding for every gradient above 1e-4 or so.
TINY = 1e-24

# torch's Newton–Schulz runs in bfloat16, of relative precision 2⁻⁸.
BFLOAT16 = 2.0**-8

TWINS = {
    "sgd": Twins(mg.optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd with decay": Twins(mg.optim.sgd(0.1, weight_decay=0.2), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.2)),
    "momentum": Twins(mg.optim.sgd(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
    "dampened momentum": Twins(mg.optim.sgd(0.1, 0.9, 0.3), lambda p: torch.optim.SGD(p, 0.1, 0.9, 0.3)),
    "nesterov": Twins(mg.optim.sgd(0.1, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
    "momentum with decay": Twins(
        mg.optim.sgd(0.1, 0.9, 0.3, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, 0.3, weight_decay=0.2),
    ),
    "adam": Twins(mg.optim.adam(0.01, eps_root=TINY), lambda p: torch.optim.Adam(p, 0.01)),
    "adam with other betas": Twins(
        mg.optim.adam(0.01, (0.5, 0.8), 1e-3, TINY), lambda p: torch.optim.Adam(p, 0.01, (0.5, 0.8), 1e-3)
    ),
    "adam with decay": Twins(
        mg.optim.adam(0.01, eps_root=TINY, weight_decay=0.2), lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.2)
    ),
    "adamw": Twins(mg.optim.adamw(0.01, eps_root=TINY), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0)),
    "adamw with decay": Twins(
        mg.optim.adamw(0.01, eps_root=TINY, weight_decay=0.2), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.2)
    ),
    "sgd with a schedule": Twins(
        mg.optim.sgd(torchopt.schedule.linear_schedule(0.1, 0.02, 4), 0.9),
        scheduled,
    ),
    "groups": Twins(
        mg.optim.groups(
            by_shape,
            {
                "matrix": mg.optim.adamw(0.03, eps_root=TINY, weight_decay=0.2),
                "vector": mg.optim.adamw(0.01, (0.5, 0.9), eps_root=TINY),
            },
        ),
        torch_groups,
    ),
    "muon": Twins(our_muon(), lambda p: torch_muon(p, weight_decay=0.0), BFLOAT16),
    "muon with decay": Twins(our_muon(weight_decay=2.0), lambda p: torch_muon(p, weight_decay=2.0), BFLOAT16),
    "muon without nesterov": Twins(
        our_muon(momentum=0.5, nesterov=False),
        lambda p: torch_muon(p, momentum=0.5, nesterov=False, weight_decay=0.0),
        BFLOAT16,
    ),
    "muon at AdamW's scale": Twins(
        our_muon(adjust_lr="match_rms_adamw", ns_steps=3),
        lambda p: torch_muon(p, adjust_lr_fn="match_rms_adamw", ns_steps=3, weight_decay=0.0),
        BFLOAT16,
    ),
}
