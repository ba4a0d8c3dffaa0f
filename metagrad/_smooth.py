"""A function with written-out formulas as an operation that every order of modes differentiates twice."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from metagrad._formulas import Formulas

Rule: TypeAlias = Callable[..., Any]
"""Takes the arguments of an operation of torch that it stands for; NotImplemented: let torch do it."""


def smooth(x: Tensor, formulas: Formulas) -> Tensor:
    """f(x), differentiable twice by reverse mode, or by reverse mode within forward mode."""
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(smooth, (x,), x, formulas)
        return result
    return _value(x, formulas)


def wide(x: Tensor, formulas: Formulas) -> Tensor:
    """f(x), computed in float32 where x is coarser, as torch does it inside such an operation."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return smooth(x, formulas)
    y = smooth(x.float(), formulas)
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def smooth_dual(x: Tensor, formulas: Formulas) -> Tensor:
    """f(x) for a dual number, differentiable once by reverse mode after the dual level; half the memory of `smooth`."""
    primal, tangent = forward_ad.unpack_dual(x)
    y, change = _pair(primal, tangent, formulas)
    dual: Tensor = y if tangent is None else forward_ad.make_dual(y, change)
    return dual


class Pair(Function):
    """(x, tangent) → (f(x), J·tangent)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tangent: Tensor | None, formulas: Formulas) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        y, saved = formulas.value(x)
        change, pushed = (None, ()) if tangent is None else formulas.push(saved, tangent)
        ctx.formulas, ctx.num_saved = formulas, len(saved)
        ctx.save_for_backward(*saved, *pushed)
        return y, change

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor | None, to_change: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        saved, pushed = ctx.saved_tensors[: ctx.num_saved], ctx.saved_tensors[ctx.num_saved :]
        to_x = None
        if ctx.needs_input_grad[0] and to_change is not None:
            to_x = ctx.formulas.second(saved, pushed, to_change)
        if ctx.needs_input_grad[0] and to_y is not None:
            pulled = ctx.formulas.pull(saved, to_y)
            to_x = pulled if to_x is None else to_x.add_(pulled)
        wanted = ctx.needs_input_grad[1] and to_change is not None
        return to_x, ctx.formulas.pull(saved, to_change) if wanted else None, None


class Value(Function):
    """x → f(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, formulas: Formulas) -> Tensor:
        y, saved = formulas.value(x)
        ctx.formulas = formulas
        ctx.save_for_backward(x, *saved)
        ctx.save_for_forward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        x, *saved = ctx.saved_tensors
        return _pull(x, cotangent, ctx.formulas, *saved), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        # Without a graph: in reverse mode within forward mode nothing differentiates a tangent.
        with torch.no_grad():
            change: Tensor = ctx.formulas.push(ctx.saved_tensors, tangent)[0]
        return change


class Pull(Function):
    """(x, cotangent) → Jᵀ·cotangent. What was saved is constant here: the formulas are in terms of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cotangent: Tensor, formulas: Formulas, *saved: Tensor) -> Tensor:
        ctx.formulas = formulas
        ctx.save_for_backward(cotangent, *saved)
        ctx.save_for_forward(cotangent, *saved)
        return formulas.pull(saved, cotangent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor | None, ...]:
        cotangent, *saved = ctx.saved_tensors
        change, pushed = ctx.formulas.push(saved, back)
        return ctx.formulas.second(saved, pushed, cotangent), change, None, *(None for _ in saved)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, tangent: Tensor | None, *_: None) -> Tensor:
        cotangent, *saved = ctx.saved_tensors
        parts: list[Tensor] = []
        if tangent is not None:
            parts.append(ctx.formulas.pull(saved, tangent))
        if x is not None:
            parts.append(ctx.formulas.second(saved, ctx.formulas.push(saved, x)[1], cotangent))
        return sum(parts[1:], start=parts[0])


_pair: Callable[..., Any] = Pair.apply
_value: Callable[..., Tensor] = Value.apply
_pull: Callable[..., Tensor] = Pull.apply
