"""Which order of modes is right for a loss, and which of those is the fastest: found out once, on the loss itself."""

import warnings
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from metagrad._modes import MODES, REFERENCE, Cotangents, Evaluate, Inputs, Mode, Pulled
from metagrad._tree import floating_leaves, joined

AUTO = "auto"


class Choice(NamedTuple):
    """The mode for a run, the seconds that each one took where they were compared, and why others were not taken."""

    mode: str
    seconds: dict[str, float]
    rejected: dict[str, str]


def choose(
    requested: str, evaluate: Evaluate, at: Inputs, gammas: Cotangents, ends: Cotangents, wrt_params: bool
) -> tuple[Choice, list[Pulled]]:
    """The mode for a run, and what it gives at these inputs, those of the first step that is reversed.

    A mode is taken only if it agrees there with reverse over reverse, which takes its place otherwise: after a warning
    if its derivative was wrong. Of those that agree, "auto" takes the fastest.

    Raises:
        ValueError: if there is no mode of the `requested` name.
        RuntimeError: if the mode of that name cannot differentiate the loss, naming the operation.

    Cost: with "auto" each mode runs twice, for the first run of a mode pays for what later ones do not.
    """
    if requested not in (AUTO, *MODES):
        raise ValueError(f"there is no mode {requested!r}. Pass one of {', '.join(map(repr, (AUTO, *MODES)))}.")
    given = evaluate, at, gammas, ends, wrt_params
    results, seconds, rejected, wrong = {}, {}, {}, []
    for name in MODES if requested == AUTO else dict.fromkeys((REFERENCE, requested)):
        try:
            results[name], seconds[name] = _timed(MODES[name], *given, repeat=requested == AUTO)
        except RuntimeError as error:
            if name == REFERENCE:
                raise
            rejected[name] = _first_line(error)
            if requested == name:
                raise RuntimeError(
                    f"{name} cannot differentiate this loss ({rejected[name]}). Replace that operation, or choose the "
                    f"mode {AUTO!r} or {REFERENCE!r}, which need no such formula."
                ) from error
            continue
        if not _finite(results[name]) or not _finite(results[REFERENCE]):
            rejected[name] = "what it gives is not finite, and cannot be compared"
        elif not agrees(results[name], results[REFERENCE]):
            rejected[name] = "it gives another derivative than reverse-over-reverse"
            wrong.append(name)
    if wrong:
        warnings.warn(
            f"{' and '.join(wrong)} gives another derivative of this loss than {REFERENCE}, which takes its place: an "
            "operation in the loss, perhaps a torch.autograd.Function, has a wrong formula for forward mode.",
            stacklevel=2,
        )
    fit = [name for name in results if name not in rejected or name == REFERENCE]
    mode = min(fit, key=seconds.__getitem__) if requested == AUTO else fit[-1]
    return Choice(mode, seconds, rejected), results[mode]


def agrees(found: Sequence[Pulled], expected: Sequence[Pulled]) -> bool:
    """Whether all tensors are equal but for rounding, each in norm; False also where one is not finite.

    The tolerance is √ε of the coarsest type: far above rounding, far below a missing term. A tensor that is nothing but
    rounding, such as the derivative by a bias that a softmax cancels, is compared with the others of its group.
    """
    precision = max((torch.finfo(x.dtype).eps for each in expected for x in joined(each)), default=0.0)
    groups = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
    for left, right in groups:
        sizes = [float(torch.linalg.vector_norm(x)) for x in right]
        gaps = [float(torch.linalg.vector_norm(x - y)) for x, y in zip(left, right, strict=True)]
        floor = precision**0.75 * sum(size**2 for size in sizes) ** 0.5
        if not all(gap <= precision**0.5 * size + floor for gap, size in zip(gaps, sizes, strict=True)):
            return False
    return True


def _finite(pulled: Sequence[Pulled]) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for each in pulled for leaf in joined(each))


def _timed(
    mode: Mode,
    evaluate: Evaluate,
    at: Inputs,
    gammas: Cotangents,
    ends: Cotangents,
    wrt_params: bool,
    *,
    repeat: bool,
) -> tuple[list[Pulled], float]:
    if repeat:
        mode(evaluate, at, gammas, ends, wrt_params)
    start = _now(at)
    found = mode(evaluate, at, gammas, ends, wrt_params)
    return found, _now(at) - start


def _now(at: Inputs) -> float:
    for device in {leaf.device for leaf in floating_leaves(at) if leaf.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return perf_counter()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
