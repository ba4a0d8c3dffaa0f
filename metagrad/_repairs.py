"""Operations whose second derivative torch gets wrong by reverse mode itself, without a word, and what is right."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Repaired(TorchFunctionMode):
    """Operations that can be differentiated twice in the place of those that torch 2.13 gets wrong, inside `with`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = REPAIRS[func](*args, **(kwargs or {})) if func in REPAIRS else NotImplemented
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`, which `torch.nn.utils.parametrizations.weight_norm` calls."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def refuse_chunks(*_: Any, options: object = None, **__: Any) -> Any:
    """Raise for chunks in torch's cross-entropy of a linear read-out; they have no second derivative but give one."""
    if options is not None:
        raise RuntimeError(
            "torch.nn.functional.linear_cross_entropy with `options` cannot be differentiated twice. Use "
            "mg.linear_cross_entropy(hidden, weight, labels, chunk_size=...), or leave `options` out."
        )
    return NotImplemented


REPAIRS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: weight_norm,
    # torch has it from 2.13 on.
    getattr(functional, "linear_cross_entropy", refuse_chunks): refuse_chunks,
}
