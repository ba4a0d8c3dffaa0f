"""Rows of tensors between ranks: put together whole, and summed to those of each. Small tensors travel together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metagrad._ranks import Ranks

BUCKET = 1 << 25
"""Bytes of whole tensors whose rows are sent at a time, where more than one has room; the copies are a rank's share."""


def rows(whole: Tensor, rank: int, num_ranks: int) -> Tensor:
    """The part of a rank of a tensor that is divided: rows along the first axis, as `torch.chunk` cuts them.

    The last ranks may have none. A tensor of shape () counts as one row.
    """
    table = whole if whole.ndim else whole.reshape(1)
    size = -(-len(table) // num_ranks)
    return table[rank * size : (rank + 1) * size]


def gathered(own: Sequence[Tensor], shapes: Sequence[Sequence[int]], ranks: Ranks, what: str) -> list[Tensor]:
    """The tensors of which each rank has its `rows`.

    Raises:
        RankError: if a rank is gone, or does not answer in time.
    """
    made = [tensor.new_empty(shape) for tensor, shape in zip(own, shapes, strict=True)]
    for bucket in _buckets(made):
        for rank in range(ranks.num_ranks):
            parts = [rows(made[i], rank, ranks.num_ranks) for i in bucket]
            if rank == ranks.rank:
                for part, i in zip(parts, bucket, strict=True):
                    part.copy_(own[i].detach())
            if len(parts) == 1:
                ranks.broadcast(parts[0], rank, what)  # Into its place.
                continue
            flat = torch.cat([part.reshape(-1) for part in parts])
            ranks.broadcast(flat, rank, what)
            if rank != ranks.rank:
                for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                    part.copy_(piece.view_as(part))
    return made


def sums_of_rows(tensors: list[Tensor], ranks: Ranks, what: str) -> list[Tensor]:
    """This rank's `rows` of the sums over the ranks; the tensors are gone from their list one after another.

    Raises:
        RankError: if a rank is gone, or does not answer in time.
    """
    for bucket in _buckets(tensors):
        own: list[Tensor] = []
        for rank in range(ranks.num_ranks):
            parts = [rows(tensors[i].detach(), rank, ranks.num_ranks) for i in bucket]
            # A copy also of one: what is not the receiver's is written over, and a gradient may share memory.
            flat = torch.cat([part.reshape(-1) for part in parts])
            ranks.reduce(flat, rank, what)
            if rank == ranks.rank:
                pieces = flat.split([part.numel() for part in parts])
                own = [
                    (piece if len(parts) == 1 else piece.clone()).view_as(part)
                    for piece, part in zip(pieces, parts, strict=True)
                ]
        for i, part in zip(bucket, own, strict=True):
            tensors[i] = part
    return tensors


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of neighbours of one kind, in bytes no more than `BUCKET`, or one."""
    buckets: list[list[int]] = []
    room = 0
    kind = None
    for i, tensor in enumerate(tensors):
        if not buckets or (tensor.dtype, tensor.device) != kind or tensor.nbytes > room:
            buckets.append([])
            room, kind = BUCKET, (tensor.dtype, tensor.device)
        buckets[-1].append(i)
        room -= tensor.nbytes
    return buckets
