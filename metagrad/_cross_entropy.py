"""Cross-entropy of a linear read-out over many classes, without ever holding all logits."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias, TypeVar, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # torch's own mark of a position that has no label

Rows: TypeAlias = Float[Tensor, "rows width"]
Matrix: TypeAlias = Float[Tensor, "classes width"]
Method = TypeVar("Method", bound=Callable[..., Any])


def linear_cross_entropy(
    hidden: Float[Tensor, "*axes width"],
    weight: Float[Tensor, "classes width"],
    labels: Int[Tensor, "*axes"],
    *,
    chunk_size: int = 256,
) -> Float[Tensor, "*axes"]:
    """−log softmax(hidden · weightᵀ)[label] at every position, 0 where the label is −100, NaN where it is no class.

    Equal to `torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")`, with the first and second
    derivatives that a training step needs; a third raises. Logits are made for `chunk_size` positions at a time and
    made again for each derivative, so that the vocabulary of a language model does not set the peak of memory.

    Cost: 11 products of the size of the logits for loss, gradient and Hessian product, where plain operations take 9;
    in memory `chunk_size` × classes numbers, a few times over.

    Raises:
        ValueError: for shapes that do not fit, labels that are no integers, or a `chunk_size` below 1.

    >>> import torch, metagrad as mg
    >>> hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(100, 8), torch.randint(100, (2, 5))
    >>> mg.linear_cross_entropy(hidden, weight, labels).shape
    torch.Size([2, 5])
    """
    if hidden.shape[:-1] != labels.shape or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden states of shape {tuple(hidden.shape)}, a weight of shape {tuple(weight.shape)} and labels of "
            f"shape {tuple(labels.shape)} do not fit. Pass (..., width), (classes, width) and (...)."
        )
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}. Pass at least 1.")
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}. Pass integers from 0 on, and {IGNORED} where there is no label.")
    # One type, and autocast off below: what is summed over a vocabulary is not rounded to bfloat16.
    kind = torch.promote_types(hidden.dtype, weight.dtype)
    rows = rearrange(hidden.to(kind), "... width -> (...) width")
    losses: Tensor = _Losses.apply(rows, weight.to(kind), labels.reshape(-1), chunk_size)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return losses.view(labels.shape)


def _without_autocast(method: Method) -> Method:
    @wraps(method)
    def run(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *others)

    return cast(Method, run)


class _Losses(torch.autograd.Function):
    """hidden, weight ↦ losses."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, hidden: Rows, weight: Matrix, labels: Tensor, chunk_size: int) -> Float[Tensor, " rows"]:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_size = chunk_size
        losses = []
        for h, y in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
            logits = h @ weight.T
            chosen = logits.gather(1, _within(y, weight)[:, None])[:, 0]
            # Their values are not read, which a compiled step could not; a NaN is refused by any step, and named.
            known = (y >= 0) & (y < len(weight))
            losses.append((logits.logsumexp(1) - chosen).masked_fill(~known, torch.nan).masked_fill(y == IGNORED, 0.0))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _Gradients.apply(*ctx.saved_tensors, cotangent, ctx.chunk_size)  # type: ignore[no-untyped-call]
        return (*gradients, None, None)


class _Gradients(torch.autograd.Function):
    """hidden, weight and the losses' cotangent b ↦ the cotangents of hidden and weight, DW and Dᵀh.

    With p = softmax(hWᵀ), the one-hot labels y and D = b∘(p − y), a row for each position.
    """

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, hidden: Rows, weight: Matrix, labels: Tensor, b: Tensor, chunk_size: int
    ) -> tuple[Rows, Matrix]:
        ctx.save_for_backward(hidden, weight, labels, b)
        ctx.chunk_size = chunk_size
        to_hidden, to_weight = [], torch.zeros_like(weight)
        for h, y, scale in _chunks(chunk_size, hidden, labels, b):
            d = scale * _excess(h @ weight.T, y)
            to_hidden.append(d @ weight)
            to_weight.addmm_(d.T, h)
        return torch.cat(to_hidden), to_weight

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, u: Rows, v: Matrix) -> tuple[Tensor | None, ...]:
        """With q = uWᵀ + hVᵀ, S = ⟨u, DW⟩ + ⟨V, Dᵀh⟩ = ⟨D, q⟩; the logits' cotangent is z̄ = b∘p∘(q − Σp∘q)."""
        hidden, weight, labels, b = ctx.saved_tensors
        to_hidden, to_weight, to_b = [], torch.zeros_like(weight), []
        for h, y, scale, change in _chunks(ctx.chunk_size, hidden, labels, b, u):
            logits = h @ weight.T
            p = logits.softmax(1)
            excess = _excess(logits, y)
            q = change @ weight.T + h @ v.T
            to_logits = (scale * (y != IGNORED)[:, None]) * p * (q - (p * q).sum(1, keepdim=True))
            d = scale * excess
            to_b.append((excess * q).sum(1))
            to_hidden.append(to_logits @ weight + d @ v)
            to_weight.addmm_(to_logits.T, h).addmm_(d.T, change)
        return torch.cat(to_hidden), to_weight, None, torch.cat(to_b), None


def _chunks(size: int, hidden: Rows, labels: Tensor, b: Tensor, *others: Rows) -> Any:
    """The same rows of all, `size` at a time; `b` as a column."""
    return zip(*(each.split(size) for each in (hidden, labels, b[:, None], *others)), strict=True)


def _excess(logits: Float[Tensor, "rows classes"], labels: Tensor) -> Float[Tensor, "rows classes"]:
    """p − y, and 0 where there is no label."""
    p = logits.softmax(1)
    p = p.scatter_add(1, _within(labels, logits.T)[:, None], -torch.ones_like(p[:, :1]))
    return p * (labels != IGNORED)[:, None]


def _within(labels: Tensor, classes: Tensor) -> Tensor:
    """`labels`, with some class in the place of what is none."""
    return labels.clamp(0, len(classes) - 1)
