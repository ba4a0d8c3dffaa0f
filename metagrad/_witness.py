"""The replay's proof: digests of what each step gave at first, which every later run of it must give again."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from metagrad._tree import names, tensor_leaves
from metagrad._types import ReplayMismatchError, State, Tree


def digests(tree: Tree) -> Int[Tensor, "leaves 2"]:
    """Σx and Σx² modulo 2^64 over each tensor's bits, read as 64-bit integers x.

    A change of one x always changes Σx; changes that cancel there do not in Σx², but by a rare accident.

    Cost: one reading of the tensors.
    """
    rows = [_digest(leaf.detach()) for leaf in tensor_leaves(tree)]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.int64)


def _digest(leaf: Tensor) -> Int[Tensor, " 2"]:
    flat = leaf.contiguous()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # torch reads memory as wider integers only where it is aligned.
    octets = flat.reshape(-1).view(torch.uint8)
    whole = len(octets) // 8 * 8
    words, rest = octets[:whole].view(torch.int64), octets[whole:].to(torch.int64)
    # The CPU multiplies and adds without a copy; CUDA has no dot product of integers.
    squares = torch.dot(words, words) if words.device.type == "cpu" else words.square().sum()
    return torch.stack([words.sum() + rest.sum(), squares + rest.square().sum()]).cpu()


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
