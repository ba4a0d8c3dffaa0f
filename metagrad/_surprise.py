"""Cross-entropy written out, for derivatives of second order."""

import torch
from torch import Tensor

from metagrad._formulas import Surprise
from metagrad._smooth import wide

NONE, MEAN = 0, 1  # torch's numbers for reductions; 2 is the sum


def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`, whose arguments are these but for `reduction`."""
    logits = input.movedim(0 if input.ndim == 1 else 1, -1)
    if input.shape == target.shape and target.is_floating_point():
        return _with_probabilities(logits, target, weight, reduction, label_smoothing)
    ignored = target == ignore_index
    target = target.masked_fill(ignored, 0)
    kept = (~ignored).to(logits.dtype) if weight is None else weight.detach()[target].masked_fill(ignored, 0)
    losses = wide(logits, Surprise(target))
    # Where nothing is ignored or weighted, nothing need be multiplied.
    losses = losses * kept if weight is not None else losses.masked_fill(ignored, 0)
    if label_smoothing > 0:
        surprises = -torch.log_softmax(logits, -1)
        uniform = (surprises if weight is None else surprises * weight.detach()).sum(-1).masked_fill(ignored, 0)
        losses = (1 - label_smoothing) * losses + label_smoothing / logits.shape[-1] * uniform
    return losses.sum() / kept.sum() if reduction == MEAN else reduced(losses, reduction)


def _with_probabilities(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, label_smoothing: float
) -> Tensor:
    target = target.movedim(0 if target.ndim == 1 else 1, -1)
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    surprises = -torch.log_softmax(logits, -1)
    losses = (target * (surprises if weight is None else surprises * weight.detach())).sum(-1)
    return reduced(losses, reduction)


def reduced(losses: Tensor, reduction: int) -> Tensor:
    """The losses themselves, their mean, or their sum."""
    return losses if reduction == NONE else losses.mean() if reduction == MEAN else losses.sum()
