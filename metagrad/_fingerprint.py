"""What makes a run the run it is, in short digests by name: so that a folder of another one is told apart, and why."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TypeAlias

import optree
import torch
from torch import Tensor

from metagrad._types import Batches, State, Tree
from metagrad._witness import digests

Fingerprint: TypeAlias = Mapping[str, str]
"""From the name of a part to its value or its digest."""


def fingerprint(
    initial: State, batches: Batches, meta: Tree, metrics: Mapping[str, Tree], wrt_params: bool
) -> Fingerprint:
    """The fingerprint of a run by what it computes with, and of its metrics by what they give, by name.

    Cost: one reading of the batches.
    """
    return {
        "version of metagrad": _own_source(),
        "version of torch": torch.__version__,
        "number of threads": str(torch.get_num_threads()),
        "number of steps": str(len(batches)),
        "wrt_params": str(wrt_params),
        **_by_leaf("state", initial),
        **_by_leaf("meta", meta),
        **{f"batches[{t}]": digest(batches[t]) for t in range(len(batches))},
        **{name: digest(marks) for name, marks in metrics.items()},
    }


def _by_leaf(root: str, tree: Tree) -> dict[str, str]:
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return {accessor.codify(root): _of_leaf(leaf) for accessor, leaf in zip(accessors, leaves, strict=True)}


def _of_leaf(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    numbers = hashlib.sha256(digests(leaf).numpy().tobytes()).hexdigest()[:16]
    return f"{leaf.device.type} {leaf.dtype} {tuple(leaf.shape)} {numbers}"


def digest(tree: Tree) -> str:
    """A short digest of everything in `tree`."""
    return hashlib.sha256(repr(sorted(_by_leaf("", tree).items())).encode()).hexdigest()[:16]


@cache
def _own_source() -> str:
    """A digest of this package's own source, since any change of it may change the last bit of a number."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
