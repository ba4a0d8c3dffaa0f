"""Whether two ways to compute a derivative agree, for ways that are faster than they are safe."""

import math
import warnings

import torch

from metagrad._tree import floating_leaves
from metagrad._types import Tree


def disagreement(found: Tree, expected: Tree, precision: float = 1e-10) -> str | None:
    """In words how far `found` is from `expected`, where that is more than rounding; None where they agree.

    Tensor by tensor, in norm. The tolerance is √ε: far above rounding, far below a missing term. A tensor that is
    nothing but rounding, as the gradient of a bias that a softmax or a norm cancels, is compared with all of them. What
    is not finite is no disagreement: the replay reports it, by name.

    Args:
        precision: the least ε; by default what a model in float64 needs that does parts of its work in float32.
    """
    right = floating_leaves(expected)
    precision = max([precision, *(torch.finfo(leaf.dtype).eps for leaf in right)])
    sizes = [float(torch.linalg.vector_norm(leaf.detach())) for leaf in right]
    floor = precision**0.75 * math.hypot(*sizes)
    for number, (a, b, size) in enumerate(zip(floating_leaves(found), right, sizes, strict=True)):
        gap = float(torch.linalg.vector_norm((a - b).detach()))
        if gap > precision**0.5 * size + floor:
            return f"it differs by {gap / (size + floor):.1e} of its size in tensor {number}"
    return None


def reason_of(error: Exception) -> str:
    """The first words of an error; compilers write pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])[:300]


def warn_uncompiled(reason: str) -> None:
    """Warn that a part of a compiled step runs uncompiled, and why."""
    warnings.warn(
        f"compile=True has no effect on a part of the training step, which runs as exactly and slower ({reason}).",
        stacklevel=2,
    )
