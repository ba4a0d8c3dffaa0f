"""One micro-batch's share of the mean loss, as a function of everything that it reads."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metagrad._buffers import DifferentiableStatistics, copies_of
from metagrad._loss import mean_share
from metagrad._refusals import refuse_changes_in_place
from metagrad._repairs import Repaired
from metagrad._tree import detached, floating_leaves, independent
from metagrad._types import Loss, Params, Scalar, Tree


class Point(NamedTuple):
    """What a loss is evaluated at."""

    params: Params
    buffers: Params
    batch: Tree
    meta: Tree


class Share(NamedTuple):
    """A micro-batch's part of the mean loss, its losses by themselves, and the buffers after it."""

    share: Scalar
    losses: Float[Tensor, "*examples"]
    buffers: Params


@dataclass(frozen=True)
class Evaluation:
    """The loss of one micro-batch, on kernels that can be differentiated twice.

    Attributes:
        num_examples, num_total: in the micro-batch and in the whole batch; None where the batch is not cut.
    """

    loss: Loss
    step: int
    num_examples: int | None
    num_total: int | None
    constant_buffers: bool

    def __call__(self, at: Point) -> Share:
        """The share at a point. It reads no value of a tensor, so that it can be traced."""
        # Detached on request; copied, since modules change their buffers in place, and the state is a value.
        copies = independent(at.buffers) if self.constant_buffers else copies_of(at.buffers)
        variables = {**at.params, **copies}
        statistics = bool(floating_leaves(at.buffers)) and not self.constant_buffers
        with sdpa_kernel(SDPBackend.MATH), DifferentiableStatistics() if statistics else nullcontext(), Repaired():
            with refuse_changes_in_place("the loss", params=at.params, batch=at.batch, meta=at.meta):
                losses = self.loss(variables, at.batch, at.meta)
        share = mean_share(losses, self.num_examples, self.num_total)
        after = {name: variables[name] for name in copies}
        return Share(share, losses.detach(), detached(after) if self.constant_buffers else after)
