"""Which order of modes is right for a loss, and which of those is the fastest: found out once, on the loss itself."""

import warnings
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metagrad._agreement import disagreement, reason_of
from metagrad._modes import MODES, REFERENCE, Cotangents, Evaluate, Inputs, Mode, Pulled
from metagrad._tree import floating_leaves, joined
from metagrad._types import Params, Scalar, Tree

AUTO = "auto"
FAST = tuple(name for name in MODES if name != REFERENCE)
WRONG = "it gives another derivative than reverse-over-reverse"

Given: TypeAlias = tuple[Inputs, Cotangents, Cotangents, bool]
"""What a `Mode` is given besides the loss."""


class Choice(NamedTuple):
    """The mode for a run, the seconds that each one took where they were compared, and why others were not taken."""

    mode: str
    seconds: dict[str, float]
    rejected: dict[str, str]


def choose(requested: str, evaluate: Evaluate, at: Inputs) -> Choice:
    """The mode for a loss, from what each gives at these inputs for cotangents drawn at random.

    A mode is taken only if it agrees there with reverse over reverse, which takes its place otherwise: after a warning
    if its derivative was wrong, or if no other has a formula. Of those that agree, "auto" takes the fastest.

    Raises:
        UncoveredError: if the loss uses an operation that forward mode is not trusted with.

    Cost: each mode once, with "auto" twice, for the first run of a mode pays for what later ones do not.
    """
    # Not those of the run, which may be zeros and prove nothing.
    given: Given = at, [_drawn(at.params)], [_drawn(at.buffers)], True
    names = FAST if requested == AUTO else (requested,)
    results, rejected = _tried(names, evaluate, given)
    if wrong := [name for name, reason in rejected.items() if reason == WRONG]:
        warnings.warn(
            f"{' and '.join(wrong)} gives another derivative of this loss than {REFERENCE}, which takes its place.",
            stacklevel=3,
        )
    elif results.keys() == {REFERENCE}:
        warnings.warn(
            f"{' and '.join(names)} cannot differentiate this loss ({rejected[names[0]]}). {REFERENCE} takes its "
            "place.",
            stacklevel=3,
        )
    fit = [name for name in results if name not in rejected]
    if requested != AUTO or len(fit) == 1:
        return Choice(fit[-1], {}, rejected)
    seconds = {name: _seconds(MODES[name], evaluate, given) for name in fit}
    return Choice(min(fit, key=seconds.__getitem__), seconds, rejected)


def _drawn(tree: Tree) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in floating_leaves(tree)]


def _tried(names: Iterable[str], evaluate: Evaluate, given: Given) -> tuple[dict[str, list[Pulled]], dict[str, str]]:
    """What the reference and the modes of these names give, and why some of them are not to be used."""
    results: dict[str, list[Pulled]] = {}
    rejected = {}
    for name in names:  # Before the reference, whose work would be lost if the loss is not covered.
        try:
            results[name] = MODES[name](evaluate, *given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            rejected[name] = reason_of(error)
    types = _Types()
    reference = MODES[REFERENCE](types.noted(evaluate), *given)
    for name, found in results.items():
        if not _finite(found) or not _finite(reference):
            rejected[name] = "what it gives is not finite, and cannot be compared"
        elif not _agree(found, reference, types.precision):
            rejected[name] = WRONG
    return {REFERENCE: reference, **results}, rejected


def _agree(found: Sequence[Pulled], expected: Sequence[Pulled], precision: float) -> bool:
    """Whether all are equal but for rounding: cotangents of the parameters, of buffers and of the metaparameters."""
    groups = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
    return all(disagreement(left, right, precision) is None for left, right in groups)


def _finite(pulled: Sequence[Pulled]) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for each in pulled for leaf in joined(each))


class _Types(TorchFunctionMode):
    """Notes the coarsest type that a loss computes in: some norms turn to float32 on the way, autocast to bfloat16."""

    precision = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.requires_grad:
            self.precision = max(self.precision, torch.finfo(result.dtype).eps)
        return result

    def noted(self, evaluate: Evaluate) -> Evaluate:
        """`evaluate`, watched."""

        def watched(params: Params, buffers: Params, meta: Tree) -> tuple[Scalar, Params]:
            with self:
                return evaluate(params, buffers, meta)

        return watched


def _seconds(mode: Mode, evaluate: Evaluate, given: Given) -> float:
    start = _now(given[0])
    mode(evaluate, *given)
    return _now(given[0]) - start


def _now(at: Inputs) -> float:
    for device in {leaf.device for leaf in floating_leaves(at) if leaf.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return perf_counter()
