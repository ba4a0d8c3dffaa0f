"""Optimizers as pure TorchOpt gradient transformations, every hyperparameter a number or a differentiable tensor.

TorchOpt 0.7.3 supplies the protocol and `chain`; its own momentum keeps its first call in a closure and its decay,
betas and dampening refuse tensors, so the transformations are written here (docs/log.md has the measurements).
"""

from typing import NamedTuple, TypeAlias

import optree
import torch
import torchopt
from jaxtyping import Int
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._tree import floating_leaves
from metagrad._types import Tree

Hyperparameter: TypeAlias = float | Tensor

__all__ = ["GradientTransformation", "adam", "adamw", "clip", "sgd"]


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


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
) -> GradientTransformation:
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
    without_momentum = not isinstance(momentum, Tensor) and momentum == 0.0
    if nesterov and without_momentum:
        raise ValueError("`nesterov=True` was given with `momentum=0`. Pass a momentum above 0, or `nesterov=False`.")
    velocity = [] if without_momentum else [_momentum(momentum, dampening, nesterov)]
    return torchopt.chain(*_decay(weight_decay), *velocity, _descend(lr))


def adam(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> GradientTransformation:
    """Adam [kingma2015], with `eps_root` inside the square root, which its derivative needs.

        m ← β₁m + (1 − β₁)g;   v ← β₂v + (1 − β₂)g²
        θ ← θ − lr · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ) + eps_root) + eps)

    Args:
        lr: learning rate.
        betas: decay rates of the two running means.
        eps: added outside the square root.
        eps_root: added inside; √eps_root is the gradient size below which Adam is linear rather than sign-like.
        weight_decay: coefficient of the decay added to the gradient (L2, as in `torch.optim.Adam`).

    Raises:
        ValueError: for `eps_root` of 0 or less: √v has no derivative at a gradient of exactly 0.
    """
    return torchopt.chain(*_decay(weight_decay), _adam(betas, eps, eps_root), _descend(lr))


def adamw(
    lr: Hyperparameter,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> GradientTransformation:
    """Adam with decoupled weight decay [loshchilov2019]: θ ← θ − lr·(adam direction + weight_decay·θ).

    Args and errors are those of `adam`; the decay does not pass through the running means.
    """
    return torchopt.chain(_adam(betas, eps, eps_root), *_decay(weight_decay), _descend(lr))


def clip(max_norm: Hyperparameter) -> GradientTransformation:
    """Gradients scaled down to a global L2 norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    Differentiable, which TorchOpt's own is not. Chain it before an optimizer: `torchopt.chain(clip(1.0), adam(1e-3))`.
    """

    def update(
        updates: Tree, state: EmptyState, *, params: Tree = None, inplace: bool = False
    ) -> tuple[Tree, EmptyState]:
        norms = torch.stack([torch.linalg.vector_norm(g) for g in floating_leaves(updates)])
        # 1e-6 as in torch, so that a run of torch.optim is reproduced to rounding.
        scale = (max_norm / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
        return optree.tree_map(lambda g: g * scale, updates), state

    return GradientTransformation(_nothing_to_remember, update)


def _decay(weight_decay: Hyperparameter) -> list[GradientTransformation]:
    """g ← g + weight_decay·θ, or no transformation for the number 0."""

    def update(
        updates: Tree, state: EmptyState, *, params: Tree = None, inplace: bool = False
    ) -> tuple[Tree, EmptyState]:
        return optree.tree_map(lambda u, p: u + weight_decay * p, updates, params), state

    without_decay = not isinstance(weight_decay, Tensor) and weight_decay == 0.0
    return [] if without_decay else [GradientTransformation(_nothing_to_remember, update)]


def _descend(lr: Hyperparameter) -> GradientTransformation:
    """u ← −lr·u."""

    def update(
        updates: Tree, state: EmptyState, *, params: Tree = None, inplace: bool = False
    ) -> tuple[Tree, EmptyState]:
        return optree.tree_map(lambda u: -lr * u, updates), state

    return GradientTransformation(_nothing_to_remember, update)


def _momentum(momentum: Hyperparameter, dampening: Hyperparameter, nesterov: bool) -> GradientTransformation:
    def init(params: Tree) -> MomentumState:
        return MomentumState(_zero_steps(), optree.tree_map(torch.zeros_like, params))

    def update(
        updates: Tree, state: MomentumState, *, params: Tree = None, inplace: bool = False
    ) -> tuple[Tree, MomentumState]:
        # Python numbers, not torch.where: a where of two Python numbers is float32 whatever the parameters are.
        share = 1.0 if int(state.step) == 0 else 1.0 - dampening
        velocity = optree.tree_map(lambda v, g: momentum * v + share * g, state.velocity, updates)
        direction = optree.tree_map(lambda g, v: g + momentum * v, updates, velocity) if nesterov else velocity
        return direction, MomentumState(state.step + 1, velocity)

    return GradientTransformation(init, update)


def _adam(
    betas: tuple[Hyperparameter, Hyperparameter], eps: Hyperparameter, eps_root: Hyperparameter
) -> GradientTransformation:
    smallest = float(eps_root.detach()) if isinstance(eps_root, Tensor) else eps_root
    if not smallest > 0.0:
        raise ValueError(
            f"`eps_root` is {smallest}, and Adam's derivative is then NaN as soon as one gradient entry is exactly 0 "
            "(an unused embedding row is enough). Pass `eps_root` > 0, for instance 1e-8: see docs/stability.md."
        )
    beta1, beta2 = betas
    if not all(isinstance(beta, Tensor) or 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"`betas` is {betas}. Both must be at least 0 and below 1.")

    def init(params: Tree) -> AdamState:
        zeros = optree.tree_map(torch.zeros_like, params)
        return AdamState(_zero_steps(), zeros, zeros)

    def update(
        updates: Tree, state: AdamState, *, params: Tree = None, inplace: bool = False
    ) -> tuple[Tree, AdamState]:
        step = state.step + 1
        mean = optree.tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, updates)
        square = optree.tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.square, updates)
        correction1, correction2 = 1 - beta1 ** int(step), 1 - beta2 ** int(step)
        direction = optree.tree_map(
            lambda m, v: (m / correction1) / ((v / correction2 + eps_root).sqrt() + eps), mean, square
        )
        return direction, AdamState(step, mean, square)

    return GradientTransformation(init, update)


def _nothing_to_remember(params: Tree) -> EmptyState:
    return EmptyState()


def _zero_steps() -> Int[Tensor, ""]:
    # On the CPU whatever the device of the parameters: the count is read at every step.
    return torch.zeros((), dtype=torch.int64)
