"""Optimizers as pure TorchOpt gradient transformations, every hyperparameter differentiable.

A hyperparameter is a number, a tensor of shape (), or a schedule: a function of the number of steps taken so far that
returns one of these. TorchOpt's schedules are such functions, and `lr=lambda step: meta["lr"][step]` is a learning rate
for each step. TorchOpt 0.7.3 supplies the protocol and `chain`; its own momentum keeps its first call in a closure and
its decay, betas and dampening refuse tensors, so the transformations are written here (docs/log.md has the
measurements). `adapt` takes in those of TorchOpt that can be trusted.
"""

from collections.abc import Callable
from typing import NamedTuple

import optree
import torch
from jaxtyping import Int
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._adapter import adapt
from metagrad._elementwise import elementwise
from metagrad._groups import groups
from metagrad._muon import muon
from metagrad._rules import AdamRule, SgdRule
from metagrad._transformation import (
    Hyperparameter,
    Steps,
    Transformation,
    Value,
    is_zero,
    values_by_step,
    zero_steps,
)
from metagrad._tree import floating_leaves
from metagrad._types import Scalar, Tree

__all__ = ["GradientTransformation", "Hyperparameter", "adam", "adamw", "adapt", "clip", "groups", "muon", "sgd"]


class MomentumState(NamedTuple):
    """Steps taken so far and the velocity of every parameter."""

    step: Int[Tensor, ""]
    velocity: Tree


class AdamState(NamedTuple):
    """Steps taken so far and the running means of every gradient and of its square."""

    step: Int[Tensor, ""]
    mean: Tree
    square: Tree


def sgd(
    lr: Hyperparameter,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    nesterov: bool = False,
    weight_decay: Hyperparameter = 0.0,
) -> Transformation:
    """Stochastic gradient descent, step for step that of `torch.optim.SGD`.

        g ← g + weight_decay·θ;   v ← momentum·v + (1 − dampening)·g  (v ← g at the first step)
        θ ← θ − lr·v              (lr·(g + momentum·v) with `nesterov`)

    Args:
        lr: learning rate.
        momentum: share of the velocity kept at each step, in [0, 1); exactly the number 0 keeps no velocity at all.
        dampening: share of the gradient that does not enter the velocity.
        nesterov: look ahead along the velocity.
        weight_decay: coefficient of the decay added to the gradient.

    Raises:
        ValueError: for Nesterov without momentum.
    """
    if nesterov and is_zero(momentum):
        raise ValueError("`nesterov=True` was given with `momentum=0`. Pass a momentum above 0, or `nesterov=False`.")
    values_at = values_by_step({"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay})

    def init(params: Tree) -> Tree:
        step = zero_steps()
        values_at(step)  # A schedule's first values are checked before training.
        return Steps(step) if is_zero(momentum) else MomentumState(step, optree.tree_map(torch.zeros_like, params))

    return elementwise(init, values_at, SgdRule(nesterov, decays=not is_zero(weight_decay)))


def adam(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> Transformation:
    """Adam [kingma2015], with `eps_root` inside the square root, which its derivative needs.

        m ← β₁m + (1 − β₁)g;   v ← β₂v + (1 − β₂)g²
        θ ← θ − lr · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ) + eps_root) + eps)

    Args:
        lr: learning rate.
        betas: decay rates of the two running means. One that is scheduled changes 1 − βᵗ too, as in `torch.optim`.
        eps: added outside the square root.
        eps_root: added inside; √eps_root is the gradient size below which Adam is linear rather than sign-like.
        weight_decay: coefficient of the decay added to the gradient (L2, as in `torch.optim.Adam`).

    Raises:
        ValueError: for `eps_root` of 0 or less: √v has no derivative at a gradient of exactly 0.
    """
    return _adam(lr, betas, eps, eps_root, weight_decay, decoupled=False)


def adamw(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> Transformation:
    """Adam with decoupled weight decay [loshchilov2019]: θ ← θ − lr·(adam direction + weight_decay·θ).

    Args and errors are those of `adam`; the decay does not pass through the running means.
    """
    return _adam(lr, betas, eps, eps_root, weight_decay, decoupled=True)


def clip(max_norm: Hyperparameter) -> Transformation:
    """Gradients scaled down to a global L2 norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    Differentiable, which TorchOpt's own is not. Chain it before an optimizer: `torchopt.chain(clip(1.0), adam(1e-3))`.
    """
    return _clip(max_norm, lambda norm: norm)


def _clip(max_norm: Hyperparameter, gathered: Callable[[Scalar], Tensor]) -> Transformation:
    """`clip` to a norm that is made of those of the parts which `gathered` gives for that of this one."""
    values_at = values_by_step({"max_norm": max_norm})

    def init(params: Tree) -> Steps:
        step = zero_steps()
        values_at(step)
        return Steps(step)

    def update(updates: Tree, state: Steps, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Steps]:
        norms = torch.stack([torch.linalg.vector_norm(g) for g in floating_leaves(updates)])
        norm = torch.linalg.vector_norm(gathered(torch.linalg.vector_norm(norms)))
        # 1e-6 as in torch, so that a run of torch.optim is reproduced to rounding.
        scale = (values_at(state.step)["max_norm"] / (norm + 1e-6)).clamp(max=1.0)
        # In the gradient's own type, which a scale of a wider one would change where the gradient is one number.
        return optree.tree_map(lambda g: (g * scale).to(g.dtype), updates), Steps(state.step + 1)

    return Transformation(init, update, on_rows=lambda divided: _clip(max_norm, divided.gathered))


def _adam(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    eps_root: Hyperparameter,
    weight_decay: Hyperparameter,
    decoupled: bool,
) -> Transformation:
    values_at = values_by_step(
        {
            "lr": lr,
            "betas[0]": betas[0],
            "betas[1]": betas[1],
            "eps": eps,
            "eps_root": eps_root,
            "weight_decay": weight_decay,
        },
        _check_adam,
    )

    def init(params: Tree) -> AdamState:
        step = zero_steps()
        values_at(step)
        zeros = optree.tree_map(torch.zeros_like, params)
        return AdamState(step, zeros, zeros)

    return elementwise(init, values_at, AdamRule(decoupled, decays=not is_zero(weight_decay)))


def _check_adam(name: str, value: Value) -> None:
    if name == "eps_root" and not value > 0.0:
        raise ValueError(
            f"`eps_root` is {float(value)}, and Adam's derivative is then NaN as soon as one gradient entry is exactly "
            "0 (an unused embedding row is enough). Pass `eps_root` > 0, for instance 1e-8: see docs/stability.md."
        )
    if name.startswith("betas") and not isinstance(value, Tensor) and not 0.0 <= value < 1.0:
        raise ValueError(f"`{name}` is {value}. Both betas must be at least 0 and below 1.")
