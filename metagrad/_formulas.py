"""Functions with their derivatives written out: f, its product with a direction, with a cotangent, and with both.

What torch differentiates well enough twice by reverse mode it may differentiate wrongly, or not at all, once by each
mode. Given these four formulas every order of modes is right: `metagrad._smooth` puts them together.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

aten = torch.ops.aten

Saved: TypeAlias = tuple[Tensor, ...]


class Formulas(ABC):
    """A function y = f(x) of one tensor. J is its Jacobian at x; no method changes what it is given."""

    @abstractmethod
    def value(self, x: Tensor) -> tuple[Tensor, Saved]:
        """y, and what the other formulas need."""

    @abstractmethod
    def push(self, saved: Saved, tangent: Tensor) -> tuple[Tensor, Saved]:
        """J·tangent, and what `second` needs of it."""

    @abstractmethod
    def pull(self, saved: Saved, cotangent: Tensor) -> Tensor:
        """Jᵀ·cotangent."""

    @abstractmethod
    def second(self, saved: Saved, pushed: Saved, cotangent: Tensor) -> Tensor:
        """∂/∂x ⟨cotangent, J·tangent⟩ for the tangent that was `pushed`."""


@dataclass(frozen=True)
class Softmax(Formulas):
    """y = exp(x) / Σ exp(x) along `dim`, so J = diag(y) − y yᵀ. Zeros where all of x is −∞, if `masked`."""

    dim: int
    masked: bool = False

    def value(self, x: Tensor) -> tuple[Tensor, Saved]:
        y: Tensor = aten._safe_softmax(x, self.dim) if self.masked else torch.softmax(x, self.dim)
        return y, (y,)

    def push(self, saved: Saved, tangent: Tensor) -> tuple[Tensor, Saved]:
        return self.pull(saved, tangent), (tangent,)

    def pull(self, saved: Saved, cotangent: Tensor) -> Tensor:
        return _centred(cotangent, saved[0], self.dim)

    def second(self, saved: Saved, pushed: Saved, cotangent: Tensor) -> Tensor:
        (y,), (tangent,) = saved, pushed
        product = cotangent - (y * cotangent).sum(self.dim, keepdim=True)
        product *= tangent - (y * tangent).sum(self.dim, keepdim=True)
        return self.pull(saved, product)


@dataclass(frozen=True)
class LogSoftmax(Formulas):
    """y = x − log Σ exp(x) along `dim`, so J = 1 − 1 pᵀ with p = exp(y)."""

    dim: int

    def value(self, x: Tensor) -> tuple[Tensor, Saved]:
        y = torch.log_softmax(x, self.dim)
        return y, (y,)

    def push(self, saved: Saved, tangent: Tensor) -> tuple[Tensor, Saved]:
        p = saved[0].exp()
        return tangent - (p * tangent).sum(self.dim, keepdim=True), (_centred(tangent, p, self.dim),)

    def pull(self, saved: Saved, cotangent: Tensor) -> Tensor:
        found: Tensor = aten._log_softmax_backward_data(cotangent, saved[0], self.dim, cotangent.dtype)
        return found

    def second(self, saved: Saved, pushed: Saved, cotangent: Tensor) -> Tensor:
        return pushed[0] * -cotangent.sum(self.dim, keepdim=True)


@dataclass(frozen=True)
class LogSumExp(Formulas):
    """y = log Σ exp(x) along `dims`, which stay with length 1; J = pᵀ with p = exp(x − y)."""

    dims: tuple[int, ...]

    def value(self, x: Tensor) -> tuple[Tensor, Saved]:
        y = torch.logsumexp(x, self.dims, keepdim=True)
        return y, ((x - y).exp_(),)

    def push(self, saved: Saved, tangent: Tensor) -> tuple[Tensor, Saved]:
        mean = (saved[0] * tangent).sum(self.dims, keepdim=True)
        return mean, ((tangent - mean).mul_(saved[0]),)

    def pull(self, saved: Saved, cotangent: Tensor) -> Tensor:
        return saved[0] * cotangent

    def second(self, saved: Saved, pushed: Saved, cotangent: Tensor) -> Tensor:
        return pushed[0] * cotangent


@dataclass(frozen=True, eq=False)
class Surprise(Formulas):
    """y = log Σ exp(x) − x[target] along the last axis: cross-entropy in two passes over x for each formula.

    With p the softmax, J = pᵀ minus the target's unit vector.
    """

    target: Tensor

    def value(self, x: Tensor) -> tuple[Tensor, Saved]:
        p = torch.softmax(x, -1)
        # Σ exp(x − max) is one over the largest p, without another pass over x.
        largest, where = x.max(-1, keepdim=True)
        y = largest - p.gather(-1, where).log() - x.gather(-1, self._index)
        return y.squeeze(-1), (p, where)

    def push(self, saved: Saved, tangent: Tensor) -> tuple[Tensor, Saved]:
        p, where = saved
        change = _centred(tangent, p, -1)
        # Σ p·tangent, read off change = p·(tangent − Σ p·tangent) where p is largest and division is safe.
        mean = tangent.gather(-1, where) - change.gather(-1, where) / p.gather(-1, where)
        return (mean - tangent.gather(-1, self._index)).squeeze(-1), (change,)

    def pull(self, saved: Saved, cotangent: Tensor) -> Tensor:
        cotangent = cotangent.unsqueeze(-1)
        return (saved[0] * cotangent).scatter_add_(-1, self._index, -cotangent)

    def second(self, saved: Saved, pushed: Saved, cotangent: Tensor) -> Tensor:
        return pushed[0] * cotangent.unsqueeze(-1)

    @property
    def _index(self) -> Tensor:
        return self.target.unsqueeze(-1)


@dataclass(frozen=True)
class Standardised(Formulas):
    """y = (x − mean) / √(variance + eps), over the last `num_axes` axes, or over all but axis 1 where it is None.

    With r = 1/√(variance + eps), J = r·P is symmetric: P·t = t − mean(t) − y·mean(y·t).
    """

    eps: float
    num_axes: int | None

    def value(self, x: Tensor) -> tuple[Tensor, Saved]:
        if self.num_axes is None:
            y, mean, r = aten.native_batch_norm(x, None, None, None, None, True, 0.0, self.eps)
        else:
            y, mean, r = aten.native_layer_norm(x, x.shape[-self.num_axes :], None, None, self.eps)
        return y, (x, y, mean, r)

    def push(self, saved: Saved, tangent: Tensor) -> tuple[Tensor, Saved]:
        change = self.pull(saved, tangent)
        return change, (tangent, change)

    def pull(self, saved: Saved, cotangent: Tensor) -> Tensor:
        x, _, mean, r = saved
        only_x = [True, False, False]
        if self.num_axes is None:
            given = cotangent, x, None, None, None, mean, r, True, self.eps, only_x
            found: Tensor = aten.native_batch_norm_backward(*given)[0]
        else:
            shape = x.shape[-self.num_axes :]
            found = aten.native_layer_norm_backward(cotangent, x, shape, mean, r, None, None, only_x)[0]
        return found

    def second(self, saved: Saved, pushed: Saved, cotangent: Tensor) -> Tensor:
        # With v the cotangent, t the tangent: −r²·(y·mean(v·Pt) + mean(y·t)·Pv + mean(y·v)·Pt).
        (x, y, _, r), (tangent, change) = saved, pushed
        axes = [n for n in range(x.ndim) if n != 1] if self.num_axes is None else list(range(-self.num_axes, 0))
        total = y * (cotangent * change).mean(axes, keepdim=True)
        total += self.pull(saved, cotangent) * (y * tangent).mean(axes, keepdim=True)
        total += change * (y * cotangent).mean(axes, keepdim=True)
        return total.mul_(-(r.view([1, -1] + [1] * (x.ndim - 2)) if self.num_axes is None else r))


def _centred(values: Tensor, p: Tensor, dim: int) -> Tensor:
    """p·(values − Σ p·values) in one pass, what torch calls the backward of a softmax."""
    found: Tensor = aten._softmax_backward_data(values, p, dim, p.dtype)
    return found
