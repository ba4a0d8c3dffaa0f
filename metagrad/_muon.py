"""Muon: momentum made orthogonal, for the matrices of a model."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._groups import groups
from metagrad._transformation import Hyperparameter, Transformation, plus_decay, values_by_step, zero_steps
from metagrad._types import Params

# x ↦ ax + bx³ + cx⁵, applied to every singular value: steep at 0, and within about 0.3 of 1 after five times.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

Matrix = Float[Tensor, "rows columns"]


class MuonState(NamedTuple):
    """Steps taken so far and the running mean of every gradient."""

    step: Int[Tensor, ""]
    mean: Params


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a parameter has two axes."""
    return tensor.ndim == 2


def muon(
    lr: Hyperparameter,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    weight_decay: Hyperparameter = 0.0,
    *,
    ns_steps: int = 5,
    adjust_lr: Literal["original", "match_rms_adamw"] = "original",
    others: GradientTransformation | None = None,
    matrices: Callable[[str, Tensor], bool] = is_matrix,
) -> Transformation:
    """Muon [jordan2024] for matrices, and `others` for the rest: step for step `torch.optim.Muon`, but for precision.

        m ← momentum·m + (1 − momentum)·g;   u = (1 − momentum)·g + momentum·m with `nesterov`, else u = m
        θ ← θ − lr·(scale·O(u) + weight_decay·θ)

    O(u) is a polynomial of u by Newton–Schulz iteration that makes all singular values nearly 1. It runs in the
    parameter's own precision, as its derivative must; torch's runs in bfloat16, so the two agree to a few per cent.

    Args:
        lr: learning rate.
        momentum: decay rate of the running mean.
        nesterov: look ahead along the running mean.
        weight_decay: coefficient of the decoupled decay.
        ns_steps: number of iterations.
        adjust_lr: scale = √max(1, rows/columns) ("original"), or 0.2·√max(rows, columns) ("match_rms_adamw"
            [liu2025]), with which the learning rate and decay of AdamW can be kept.
        others: the optimizer of all other parameters, for instance `adamw(3e-4)`.
        matrices: from a name and a tensor to whether Muon updates it. Embeddings and read-outs are often left to
            `others`: `lambda name, tensor: tensor.ndim == 2 and "embed" not in name`.

    Raises:
        ValueError: for an unknown `adjust_lr` or `ns_steps` below 1; at `init`, for a parameter that is no matrix
            and has no other optimizer.

    Note:
        O does not depend on the size of u, so its derivative grows as 1/‖u‖ up to a norm of 1e-7, below which it is
        constant: a matrix that the loss does not use is left alone by both (docs/stability.md).
    """
    if adjust_lr not in ("original", "match_rms_adamw"):
        raise ValueError(f"`adjust_lr` is {adjust_lr!r}. Pass 'original' or 'match_rms_adamw'.")
    if ns_steps < 1:
        raise ValueError(f"`ns_steps` is {ns_steps}. Pass at least 1; the usual number is 5.")
    values_at = values_by_step({"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def scaled(u: Matrix) -> Matrix:
        rows, columns = u.shape
        scale = math.sqrt(max(1, rows / columns)) if adjust_lr == "original" else 0.2 * math.sqrt(max(rows, columns))
        return scale * orthogonalised(u, ns_steps)

    def init(params: Params) -> MuonState:
        step = zero_steps()
        values_at(step)  # A schedule's first values are checked before training.
        return MuonState(step, {name: torch.zeros_like(p) for name, p in params.items()})

    def update(
        updates: Params, state: MuonState, *, params: Params | None = None, inplace: bool = False
    ) -> tuple[Params, MuonState]:
        now = values_at(state.step)
        kept = now["momentum"]
        mean = {name: kept * state.mean[name] + (1 - kept) * g for name, g in updates.items()}
        ahead = {name: (1 - kept) * g + kept * mean[name] for name, g in updates.items()} if nesterov else mean
        direction = {name: scaled(u) for name, u in ahead.items()}
        decayed = plus_decay(direction, params, now["weight_decay"])
        return {name: -now["lr"] * u for name, u in decayed.items()}, MuonState(state.step + 1, mean)

    def kind(name: str, tensor: Tensor) -> str:
        chosen = matrices(name, tensor)
        if chosen and tensor.ndim != 2 or not chosen and others is None:
            raise ValueError(
                f"Muon updates matrices, but parameter {name!r} has shape {tuple(tensor.shape)}"
                + (" and `matrices` chose it. Let it choose" if chosen else " and no other optimizer. Pass `others`,")
                + (" tensors of two axes." if chosen else " for instance mg.optim.adamw(lr=3e-4).")
            )
        return "matrices" if chosen else "others"

    both = {"matrices": Transformation(init, update)}
    return groups(kind, both if others is None else {**both, "others": others})


def orthogonalised(u: Matrix, num_steps: int) -> Matrix:
    """`num_steps` of Newton–Schulz on u/‖u‖: the singular vectors of u, its singular values all nearly 1."""
    a, b, c = COEFFICIENTS
    rows, columns = u.shape
    x: Matrix = u.mT if rows > columns else u  # The smaller of the two products.
    # 1e-7 as in torch; the gradient of a norm at 0 is 0 in torch, so no NaN arises there.
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if rows > columns else x
