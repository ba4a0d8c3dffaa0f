"""Products and sums of dual numbers, for reverse mode over forward mode.

torch's own rules are right, but give a factor that has no tangent one of zeros: passes over memory for copies and for
cotangents of zero. These rules make no more than there is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import Function

from metagrad._smooth import Rule, smooth, smooth_dual


def product(function: Callable[[Any, Any], Tensor]) -> Rule:
    """The rule for a function that is linear in each of two arguments: ẏ = f(ȧ, b) + f(a, ḃ)."""

    def rule(left: Any, right: Any, **options: Any) -> Any:
        (a, da), (b, db) = _split(left), _split(right)
        if options or (da is None and db is None):
            return NotImplemented
        changes = [function(da, b)] if da is not None else []
        changes += [function(a, db)] if db is not None else []
        return _dual(function(a, b), sum(changes[1:], changes[0]))

    return rule


def total(function: Callable[[Any, Any], Tensor], signs: tuple[int, int]) -> Rule:
    """The rule for ±a ±b where one of them has no tangent; torch's own where both have."""

    def rule(left: Any, right: Any, **options: Any) -> Any:
        (a, da), (b, db) = _split(left), _split(right)
        if options or (da is None) == (db is None):
            return NotImplemented
        change, sign = (da, signs[0]) if da is not None else (db, signs[1])
        assert change is not None
        return _dual(function(a, b), change if sign > 0 else -change)

    return rule


def quotient(left: Any, right: Any, **options: Any) -> Any:
    """The rule for a / b where b has no tangent."""
    (a, da), (b, db) = _split(left), _split(right)
    if options or da is None or db is not None:
        return NotImplemented
    return _dual(a / b, da / b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The rule for x·weightᵀ + bias."""
    if weight.ndim != 2 or _casting(x):
        return NotImplemented
    return _affine(_rows(x), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])


def addmm(bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Any:
    """The rule for bias + x·weight, as one vector or for each row."""
    return NotImplemented if options or _casting(x) else _affine(x, weight, bias)


def matmul(left: Tensor, right: Tensor, **options: Any) -> Any:
    """The rule for left @ right, batched or not."""
    if options or _casting(left):
        return NotImplemented
    if right.ndim == 2 and left.ndim >= 2:
        return _affine(_rows(left), right, None).view(*left.shape[:-1], right.shape[1])
    return _matmul(left, right)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    split = [_split(each) for each in (x, weight, bias)]
    if all(change is None for _, change in split):
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return _dual(*_affine_pair(*(part for each in split for part in each)))


class Affine(Function):
    """y = x·w + b and its tangent: eight products in all with its backward, where ẇ is a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dx: Tensor | None, w: Tensor, dw: Tensor | None, b: Tensor | None, db: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dx, w, dw)
        ctx.shapes = [None if each is None else each.shape for each in (b, db)]
        y = x @ w if b is None else torch.addmm(b, x, w)
        start = None if dx is None else dx @ w if db is None else torch.addmm(db, dx, w)
        change = _sum(start, x, dw)
        if change is None:
            assert db is not None
            change = db.expand_as(y).clone()
        elif dx is None and db is not None:
            change += db
        return y, change

    @staticmethod
    def backward(ctx: Any, to_y: Tensor | None, to_change: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dx, w, dw = (None if each is None else each.t() for each in ctx.saved_tensors)
        need = ctx.needs_input_grad
        return (
            _sum(_sum(None, to_y, w), to_change, dw) if need[0] else None,
            _sum(None, to_change, w) if need[1] else None,
            _sum(_sum(None, x, to_y), dx, to_change) if need[2] else None,
            _sum(None, x, to_change) if need[3] else None,
            to_y.sum_to_size(ctx.shapes[0]) if need[4] and to_y is not None else None,
            to_change.sum_to_size(ctx.shapes[1]) if need[5] and to_change is not None else None,
        )


def _sum(start: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """start + left·right, where what is None counts as zero; `start` may be overwritten."""
    if left is None or right is None:
        return start
    return left @ right if start is None else start.addmm_(left, right)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _casting(x: Tensor) -> bool:
    # Under autocast the parts of a product would be of other types than the product.
    return torch.is_autocast_enabled(x.device.type)


def _split(value: Any) -> tuple[Any, Tensor | None]:
    return forward_ad.unpack_dual(value) if isinstance(value, Tensor) else (value, None)


def _dual(value: Tensor, change: Tensor) -> Tensor:
    change = change.to(value.dtype)
    dual: Tensor = forward_ad.make_dual(value, change if change.shape == value.shape else change.expand_as(value))
    return dual


_affine_pair: Callable[..., tuple[Tensor, Tensor]] = Affine.apply
_mul, _matmul, _add = product(torch.mul), product(torch.matmul), total(torch.add, (1, 1))
_sub, _rsub = total(torch.sub, (1, -1)), total(lambda a, b: b - a, (-1, 1))

JETS: Mapping[Callable[..., Any], Rule] = {
    smooth: smooth_dual,
    torch.nn.functional.linear: linear,
    torch.addmm: addmm,
    **dict.fromkeys([torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__], matmul),
    **dict.fromkeys([torch.bmm, Tensor.bmm], _matmul),
    **dict.fromkeys([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply], _mul),
    **dict.fromkeys([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__], _add),
    **dict.fromkeys([torch.sub, Tensor.sub, Tensor.__sub__], _sub),
    **dict.fromkeys([torch.div, Tensor.div, Tensor.__truediv__], quotient),
    Tensor.__rsub__: _rsub,
}
