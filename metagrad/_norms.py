"""Normalisation written out, for derivatives of second order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metagrad._formulas import Standardised
from metagrad._smooth import Rule, wide


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """`torch.layer_norm`."""
    return _affine(wide(input, Standardised(eps, len(normalized_shape))), weight, bias)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """`torch.group_norm`."""
    groups = input.reshape(input.shape[0], num_groups, -1)
    y = wide(groups, Standardised(eps, 1)).view(input.shape)
    return _affine(y, _per_channel(weight, input), _per_channel(bias, input))


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """`torch.batch_norm`; without running statistics of its own where these have a gradient."""
    if not training or input.ndim < 2:
        return NotImplemented
    if running_mean is not None:
        with torch.no_grad():
            torch.batch_norm(input, None, None, running_mean, running_var, True, momentum, eps, cudnn_enabled)
    y = wide(input, Standardised(eps, None))
    return _affine(y, _per_channel(weight, input), _per_channel(bias, input))


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """`torch.instance_norm`."""
    if not use_input_stats:
        return NotImplemented
    if running_mean is not None:
        with torch.no_grad():
            torch.instance_norm(input, None, None, running_mean, running_var, True, momentum, eps, cudnn_enabled)
    y = wide(input.flatten(2), Standardised(eps, 1)).view(input.shape)
    return _affine(y, _per_channel(weight, input), _per_channel(bias, input))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _per_channel(values: Tensor | None, input: Tensor) -> Tensor | None:
    return None if values is None else values.view([-1] + [1] * (input.ndim - 2))


def with_statistics(running: Callable[..., Tensor]) -> Rule:
    """Running statistics that have a gradient keep it, as `DifferentiableStatistics` sees to."""

    def rule(input: Tensor, running_mean: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if running_mean is None or not running_mean.requires_grad:
            return NotImplemented
        return running(input, running_mean, *args, **kwargs)

    return rule
