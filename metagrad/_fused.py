"""Sums of scaled terms in one reading of each, where the scale is a number.

Where it is a tensor of shape () the same is written in operations that autograd and torch.compile take it through.
"""

import torch
from torch import Tensor


def plus(x: Tensor, scale: float | Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x + scale·y."""
    if isinstance(scale, Tensor):
        return torch.add(x, scale * y, out=out)
    return torch.add(x, y, alpha=scale, out=out)


def mixed(x: Tensor, share: float | Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """(1 − share)·x + share·y."""
    if isinstance(share, Tensor):
        return torch.add(x, share * (y - x), out=out)
    return torch.lerp(x, y, share, out=out)


def plus_product(x: Tensor, scale: float | Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """x + scale·a·b."""
    if isinstance(scale, Tensor):
        return torch.add(x, scale * a * b, out=out)
    return torch.addcmul(x, a, b, value=scale, out=out)


def plus_quotient(x: Tensor, scale: float | Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """x + scale·a/b."""
    if isinstance(scale, Tensor):
        return torch.add(x, scale * a / b, out=out)
    return torch.addcdiv(x, a, b, value=scale, out=out)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ left·right."""
    return (left * right).sum()
