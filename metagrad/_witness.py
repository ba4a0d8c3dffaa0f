"""The replay's proof: digests of what each step gave at first, which every later run of it must give again."""

import hashlib
from dataclasses import dataclass, field
from math import isqrt

import torch
from jaxtyping import Int
from torch import Tensor

from metagrad._tree import names, tensor_leaves
from metagrad._types import ReplayMismatchError, State, Tree


def digests(tree: Tree) -> Int[Tensor, "leaves 2"]:
    """128 bits of each tensor: its bits as 64-bit integers in a square, the sums of rows and of columns, hashed.

    Every change of up to three integers is seen, and so is every exchange of two: sums modulo 2^64 stay the same only
    where each changed row and each changed column has two changes or more.

    Cost: two readings of the tensors.
    """
    rows = [_digest(leaf.detach()) for leaf in tensor_leaves(tree)]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.int64)


def _digest(leaf: Tensor) -> Int[Tensor, " 2"]:
    flat = leaf.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride(0) != 1 or flat.storage_offset() * flat.element_size() % 8:
        # torch reads memory as other integers only where it is aligned and, be it of one element, of stride 1.
        flat = flat.clone(memory_format=torch.contiguous_format)
    octets = flat.view(torch.uint8)
    side = isqrt(len(octets) // 8)
    square = octets[: 8 * side * side].view(torch.int64).view(side, side)
    hashed = hashlib.sha256()
    for part in (square.sum(0), square.sum(1), octets[8 * side * side :]):
        hashed.update(part.cpu().numpy().tobytes())
    return torch.frombuffer(bytearray(hashed.digest()[:16]), dtype=torch.int64)


@dataclass
class Witness:
    """The digests of every state of one run, by step."""

    seen: dict[int, Int[Tensor, "leaves 2"]] = field(default_factory=dict)

    @staticmethod
    def of(table: Int[Tensor, "steps leaves 2"]) -> "Witness":
        """The witness with the rows of a table by step; a row of zeros stands for a state not seen."""
        return Witness({step: row for step, row in enumerate(table) if bool(row.any())})

    def table(self, last: int) -> Int[Tensor, "steps leaves 2"]:
        """What `of` reads, up to the state of step `last`."""
        nothing = torch.zeros_like(self.seen[last])
        return torch.stack([self.seen.get(step, nothing) for step in range(last + 1)])

    def see(self, state: State) -> None:
        """Record `state`, or compare it with the one that its step gave before.

        Raises:
            ReplayMismatchError: naming the step and the tensors that differ.
        """
        new = digests(state)
        old = self.seen.setdefault(state.step, new)
        if torch.equal(old, new):
            return
        differ = [name for name, same in zip(names("state", state), (old == new).all(1), strict=True) if not same]
        raise ReplayMismatchError(
            f"step {state.step - 1} was run again and gave another {', '.join(differ)} than the first time, so the "
            "gradient would be that of no run. Likely causes: a nondeterministic kernel (on a GPU try "
            "torch.use_deterministic_algorithms(True)), batches that differ between two readings, or a loss or "
            "optimizer that remembers something outside the state. `mg.check.determinism` tells which."
        )
