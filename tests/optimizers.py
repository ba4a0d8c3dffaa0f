"""The optimizers that every claim is tested on, and the one of torch that each must equal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

import metagrad as mg

# Large enough that Adam is smooth on the scale of a finite difference.
SMOOTH = {"betas": (0.8, 0.95), "eps": 1e-6, "eps_root": 1e-3}

OPTIMIZERS = {
    "sgd": mg.optim.sgd(lr=0.1),
    "momentum": mg.optim.sgd(lr=0.05, momentum=0.8),
    "nesterov": mg.optim.sgd(lr=0.05, momentum=0.8, nesterov=True),
    "adam": mg.optim.adam(lr=0.02, **SMOOTH),
    "adamw": mg.optim.adamw(lr=0.02, weight_decay=0.1, **SMOOTH),
}


@dataclass(frozen=True)
class Twins:
    """One optimizer, ours and torch's."""

    ours: GradientTransformation
    torch: Callable[[list[Tensor]], torch.optim.Optimizer]


# torch has no eps_root. At 1e-24 it changes √v by less than rounding for every gradient above 1e-4 or so.
TINY = 1e-24

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
}
