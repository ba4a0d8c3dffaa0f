"""Operations that torch differentiates wrongly, or not at all, by forward and reverse mode together, and what is right.

On torch 2.13, in reverse mode over forward mode: layer, batch and instance norm are wrong without a word; softmax,
cross-entropy and what is made of them raise an error. In forward mode over reverse mode SiLU, Mish, group norm, Huber
loss and others raise one. tests/test_composites.py has the table.
"""

from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType, MappingProxyType
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from metagrad import _buffers
from metagrad._activations import GELU, MISH, SILU, Activation
from metagrad._attention import scaled_dot_product_attention
from metagrad._formulas import LogSoftmax, LogSumExp, Softmax
from metagrad._norms import batch_norm, group_norm, instance_norm, layer_norm, with_statistics
from metagrad._repairs import REPAIRS
from metagrad._smooth import Rule, wide
from metagrad._surprise import cross_entropy_loss, reduced


class Composites(TorchFunctionMode):
    """Operations equal to torch's to rounding, with derivatives that are right in any order of modes, inside `with`.

    Gradients that are stopped by `torch.no_grad` are stopped in forward mode, too.

    Args:
        rules: further operations to replace.
    """

    def __init__(self, rules: Mapping[Callable[..., Any], Rule] = MappingProxyType({})) -> None:
        super().__init__()
        self._rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        result = self._rules[func](*args, **kwargs) if func in self._rules else NotImplemented
        if result is NotImplemented and func in COMPOSITES:
            # What a composite is made of has composites and rules itself.
            with self:
                result = COMPOSITES[func](*args, **kwargs)
        if result is NotImplemented and (body := _body(func)):
            with self:
                result = body(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def _body(func: Any) -> Rule | None:
    """A Python function of torch without its first lines, which would hand it to the mode again."""
    if not isinstance(func, FunctionType) or func.__module__ not in ("torch.nn.functional", "torch.functional"):
        return None
    return _unchecked(func)


@cache
def _unchecked(func: FunctionType) -> Rule | None:
    checks = {name: lambda *_: False for name in func.__code__.co_names if name.startswith("has_torch_function")}
    if not checks:
        return None
    body = FunctionType(
        func.__code__, {**func.__globals__, **checks}, func.__name__, func.__defaults__, func.__closure__
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax`."""
    return wide(input if dtype is None else input.to(dtype), Softmax(dim))


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.log_softmax`."""
    return wide(input if dtype is None else input.to(dtype), LogSoftmax(dim))


def logsumexp(input: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """`torch.logsumexp`."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(input.ndim))
    y = wide(input, LogSumExp(dims))
    return y if keepdim else y.squeeze(dims)


def _activation(formulas: Activation, inplace: bool = False) -> Rule:
    def rule(input: Tensor) -> Tensor:
        return input.copy_(wide(input.clone(), formulas)) if inplace else wide(input, formulas)

    return rule


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`."""
    return wide(input, GELU[approximate])


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """`torch.nn.functional.glu`."""
    left, right = input.chunk(2, dim)
    return left * right.sigmoid()


def logit(input: Tensor, eps: float | None = None) -> Tensor:
    """`torch.logit`."""
    x = input if eps is None or eps < 0 else input.clamp(eps, 1 - eps)
    return (x / (1 - x)).log()


def mse_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """`torch.nn.functional.mse_loss`."""
    gap = input - target
    return reduced(gap * gap, reduction)


def huber_loss(input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    """`torch.nn.functional.huber_loss`."""
    gap = input - target
    return reduced(torch.where(gap.abs() <= delta, 0.5 * gap * gap, delta * (gap.abs() - 0.5 * delta)), reduction)


def soft_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """`torch.nn.functional.soft_margin_loss`."""
    return reduced((1 + (-input * target).exp()).log(), reduction)


def embedding(
    weight: Tensor, input: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """`torch.embedding` with a row that has no gradient, of which torch's forward mode knows nothing."""
    if padding_idx < 0 or scale_grad_by_freq or sparse:
        return NotImplemented
    rows = torch.embedding(weight, input)
    return torch.where((input == padding_idx).unsqueeze(-1), rows.detach(), rows)


def vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.linalg.vector_norm` for a sum of absolute values; the others are right as they are."""
    return NotImplemented if ord != 1 else x.abs().sum(dim, keepdim, dtype=dtype)


def _no_gradient(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("the loss takes a gradient itself, by torch.autograd")


nn = torch._C._nn

COMPOSITES: Mapping[Callable[..., Any], Rule] = {
    **dict.fromkeys([torch.softmax, Tensor.softmax, torch.special.softmax], softmax),
    **dict.fromkeys([torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax], log_softmax),
    **dict.fromkeys([torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp], logsumexp),
    nn.cross_entropy_loss: cross_entropy_loss,
    nn.scaled_dot_product_attention: scaled_dot_product_attention,
    functional.batch_norm: with_statistics(_buffers.batch_norm),
    functional.instance_norm: with_statistics(_buffers.instance_norm),
    torch.layer_norm: layer_norm,
    torch.group_norm: group_norm,
    torch.batch_norm: batch_norm,
    torch.instance_norm: instance_norm,
    nn.silu: _activation(SILU),
    nn.silu_: _activation(SILU, inplace=True),
    nn.mish: _activation(MISH),
    nn.mish_: _activation(MISH, inplace=True),
    nn.gelu: gelu,
    nn.glu: glu,
    nn.mse_loss: mse_loss,
    nn.huber_loss: huber_loss,
    nn.soft_margin_loss: soft_margin_loss,
    **dict.fromkeys([torch.logit, Tensor.logit, torch.special.logit], logit),
    torch.linalg.vector_norm: vector_norm,
    torch.embedding: embedding,
    **REPAIRS,
    Tensor.norm: torch.norm,
    **dict.fromkeys([torch.autograd.grad, torch.autograd.backward, Tensor.backward], _no_gradient),
}
