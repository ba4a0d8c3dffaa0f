"""Running statistics as differentiable state: normalisation layers whose updates autograd can follow.

torch's kernels change the running mean and variance in place, out of autograd's sight, and refuse to differentiate what
reads them. Under `DifferentiableStatistics` both are ordinary operations; the normalised output is torch's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from metagrad._types import Params


class DifferentiableStatistics(TorchFunctionMode):
    """Batch and instance norm with running statistics that have a gradient, inside a `with` block.

    `metagradient` evaluates metrics in it. After `mg.train` a loss that reads `state.buffers` is to be computed in it:
    torch's own layers refuse running statistics with a graph.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement: Callable[..., Tensor] = {
            functional.batch_norm: batch_norm,
            functional.instance_norm: instance_norm,
        }.get(func, func)
        return replacement(*args, **(kwargs or {}))


def copies_of(buffers: Params) -> Params:
    """Copies that a loss may change in place, each with a graph, so that `refuse_unseen_changes` can tell how."""
    return {
        name: buffer.clone() if buffer.requires_grad or not buffer.is_floating_point() else _leaf(buffer).clone()
        for name, buffer in buffers.items()
    }


def _leaf(buffer: Tensor) -> Tensor:
    return buffer.detach().requires_grad_()


def refuse_unseen_changes(before: Params, copies: Params) -> None:
    """Raise for a copy that has another value than `before`, and still the graph of a mere copy.

    A change under `torch.no_grad` does that: whatever reads the buffer would be differentiated as if it were unchanged.
    """
    for name, copy in copies.items():
        untouched = copy.grad_fn is not None and copy.grad_fn.name() == "CloneBackward0"
        if untouched and not torch.equal(copy, before[name]):
            raise ValueError(
                f"buffer {name!r} is changed under torch.no_grad or through .data, where no derivative can follow. "
                "Change it with gradients on, or take all buffers as constants: TrainStep(constant_buffers=True)."
            )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, to rounding, differentiable in the running statistics as well."""
    if training:
        if running_mean is not None and running_var is not None:
            axes = [axis for axis in range(input.ndim) if axis != 1]
            _move(running_mean, input.mean(axes), momentum)
            _move(running_var, input.var(axes), momentum)
        return functional.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    if running_mean is None or running_var is None or not (running_mean.requires_grad or running_var.requires_grad):
        return functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _normalised(input, running_mean, running_var, weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`, to rounding, differentiable in the running statistics as well."""
    if use_input_stats:
        if running_mean is not None and running_var is not None:
            axes = list(range(2, input.ndim))
            _move(running_mean, input.mean(axes).mean(0), momentum)
            _move(running_var, input.var(axes).mean(0), momentum)
        return functional.instance_norm(input, None, None, weight, bias, True, momentum, eps)
    assert running_mean is not None and running_var is not None
    return _normalised(input, running_mean, running_var, weight, bias, eps)


def _move(running: Tensor, statistic: Tensor, momentum: float) -> None:
    # In place, as the module expects; the tensor is the step's own copy.
    running.copy_((1 - momentum) * running + momentum * statistic)


def _normalised(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = [1, -1] + [1] * (input.ndim - 2)
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    return input * scale.view(shape) + shift.view(shape)
