"""The training loss of a step: weights on examples, micro-batches, and the checks of what a loss returns."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from metagrad._tree import describe, map_tensors, tensor_leaves
from metagrad._types import ExampleLoss, NonFiniteError, Params, Scalar, Tree


@dataclass(frozen=True)
class WeightedLoss:
    """`loss` with every example's or token's loss multiplied by its own weight; made by `weighted`."""

    loss: ExampleLoss

    def __call__(self, params: Params, batch: Tree, meta: Tree) -> Float[Tensor, " examples"]:
        weights: Tensor = meta["weights"][batch["index"]]
        losses = self.loss(params, batch)
        if losses.shape != weights.shape:
            raise ValueError(
                f"the loss under `mg.weighted` has shape {tuple(losses.shape)}, and the batch has weights of shape "
                f"{tuple(weights.shape)}. Return one loss per example, or per token, as the weights are."
            )
        return reduce(weights * losses, "examples ... -> examples", "sum")

    def index_range(self, batch: Tree, step: int) -> tuple[int, int]:
        """The lowest and the highest example that the batch of `step` refers to.

        Raises:
            ValueError: if the batch does not say which examples it holds.
        """
        index = batch.get("index") if isinstance(batch, dict) else None
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"`mg.weighted` reads batch['index'], the index of each example's weight, but batch {step} is "
                f"{describe(batch)}. Add an int64 tensor of shape (examples,) under the key 'index'."
            )
        return int(index.min()), int(index.max())

    def validate(self, meta: Tree, lowest: int, highest: int) -> None:
        """Check before any training that every example has a weight.

        Raises:
            ValueError: naming the highest index used.
        """
        weights = meta["weights"] if isinstance(meta, dict) and "weights" in meta else None
        if not isinstance(weights, Tensor) or weights.ndim == 0 or not weights.is_floating_point():
            raise ValueError(
                f"`mg.weighted` reads meta['weights'], a floating-point tensor of one weight per example, but got "
                f"{describe(meta if weights is None else weights)}. Pass meta={{'weights': torch.ones(num_examples)}}, "
                "or torch.ones(num_examples, num_tokens)."
            )
        if lowest < 0:
            raise ValueError(f"a batch refers to example {lowest}. Indices count from 0.")
        if highest >= len(weights):
            raise ValueError(
                f"`weights` has {len(weights)} entries, but a batch refers to example {highest}. "
                f"Pass one weight per training example: shape ({highest + 1},) or longer."
            )

    def can_be_checked(self, batch: Tree, meta: Tree) -> bool:
        """Whether every example weighs enough for an error in its own term to show in the sum of all."""
        sizes = meta["weights"][batch["index"]].detach().abs()
        return bool(sizes.min() > 1e-3 * sizes.max())


def weighted(loss: ExampleLoss) -> WeightedLoss:
    """`loss(params, batch)` times `meta["weights"][batch["index"]]`, example by example or token by token.

    The step takes the mean over the batch of weight times loss; the weights are not normalised. With weights of shape
    (num_examples, tokens) the loss returns (examples, tokens), and an example's loss is the sum over its tokens: divide
    by the denominator you want in `loss`, for instance each example's number of tokens.
    """
    return WeightedLoss(loss)


class Piece(NamedTuple):
    """A micro-batch: its examples, how many they are, and how many the whole batch has; None where nothing is cut."""

    batch: Tree
    num_examples: int | None
    num_total: int | None


def cut(batch: Tree, microbatch_size: int | None) -> Iterator[Piece]:
    """The micro-batches of `batch`, in order.

    Raises:
        ValueError: if the tensors of the batch cannot be cut along a common first axis.
    """
    if microbatch_size is None:
        yield Piece(batch, None, None)
        return
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensor_leaves(batch)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"`microbatch_size={microbatch_size}` cuts every tensor of a batch along its first axis, but the batch is "
            f"{describe(batch)}. Give all tensors one entry per example, or pass microbatch_size=None."
        )
    num_total = lengths.pop()
    for start in range(0, num_total, microbatch_size):
        rows = slice(start, min(start + microbatch_size, num_total))
        yield Piece(map_tensors(itemgetter(rows), batch), rows.stop - start, num_total)


def mean_share(losses: Tensor, num_examples: int | None, num_total: int | None) -> Scalar:
    """The part of the batch's mean loss that comes from the `losses` of one piece.

    Raises:
        ValueError: if `losses` is neither one loss per example nor, for an uncut batch, a scalar.
    """
    if num_examples is not None and losses.ndim == 0:
        raise ValueError(
            "the loss is a scalar, so its batch cannot be cut, as `microbatch_size` or several ranks ask for. "
            "Return one loss per example, or leave them out."
        )
    if losses.ndim > 1 or losses.numel() == 0 or num_examples not in (None, losses.numel()):
        expected = "(examples,)" if num_examples is None else f"({num_examples},)"
        raise ValueError(
            f"the loss has shape {tuple(losses.shape)}. Return one loss per example, shape {expected}, or a scalar."
        )
    return losses if losses.ndim == 0 else losses.sum() / (num_total or len(losses))


def refuse_non_finite_losses(losses: Tensor, step: int) -> None:
    """Raise for a loss that is NaN or infinite, naming the step and how many there are."""
    if not bool(torch.isfinite(losses).all()):
        raise NonFiniteError(
            f"the training loss is not finite at step {step}: {int(losses.isnan().sum())} NaN and "
            f"{int(losses.isinf().sum())} infinite of {losses.numel()} values. Look at that batch, lower the learning "
            "rate, or set `clip_norm`."
        )


def loss_gradient(loss: Scalar, params: Params, keep_graph: bool) -> list[Tensor]:
    """∇_θ loss in the order of `params`; zeros for parameters it does not use.

    Raises:
        ValueError: if it uses none of them, or has a sparse gradient.
    """
    leaves = list(params.values())
    found = (
        torch.autograd.grad(loss, leaves, create_graph=keep_graph, allow_unused=True) if loss.requires_grad else [None]
    )
    if all(gradient is None for gradient in found):
        # A loss that calls the model itself has a gradient, but of the model's own parameters.
        raise ValueError(
            "the loss does not depend on the parameters. Use the `params` it is given: "
            "torch.func.functional_call(model, params, ...), not model(...)."
        )
    if sparse := [name for name, g in zip(params, found, strict=True) if g is not None and g.is_sparse]:
        raise ValueError(f"the gradient of {', '.join(sparse)} is sparse. Use torch.nn.Embedding without sparse=True.")
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
