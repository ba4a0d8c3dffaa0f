"""Operations of a GRPO step and, from constants that were measured or given, its seconds."""

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import metagrad as mg
from dpg.plan import graphs
from dpg.plan.lines import FLOAT, kind
from dpg.plan.memory import drawn_at_once
from dpg.plan.workload import Inner, Workload, Writer

ASSUMED_SHARE = 0.4
"""Of the operations that a device can do, those that are reached where nobody measured it."""


class Work(NamedTuple):
    """A part of a GRPO step, on all devices together.

    Attributes:
        arithmetic: how `operations` came about; F is a forward pass over the texts named.
        operations: floating-point multiplications and additions.
        bytes_read: the least that one device reads from its memory for it; 0 where arithmetic takes longer.
    """

    what: str
    arithmetic: str
    operations: float
    bytes_read: float = 0.0


@dataclass(frozen=True)
class Speed:
    """What a device does in a second.

    Args:
        flops: floating-point operations of a product of matrices in the type of the weights.
        share: of these, what a step reaches.
        bandwidth: bytes of its memory that it reads or writes; None if not known.
        source: where the constants are from.
    """

    flops: float
    share: float = ASSUMED_SHARE
    bandwidth: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("flops", "share", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}. Pass a number above 0.")
        if self.share > 1:
            raise ValueError(f"share is {self.share}. Pass at most 1: a part of `flops`.")

    def seconds(self, work: Work, devices: int) -> float:
        """Of a part of a step."""
        arithmetic = work.operations / (self.flops * self.share * devices)
        return arithmetic if self.bandwidth is None else max(arithmetic, work.bytes_read / self.bandwidth)

    def save(self, path: Path) -> None:
        """Write the constants to a file for `read_speed`."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_speed(path: Path) -> Speed:
    """The constants of a file.

    Raises:
        ValueError: if it holds none.
    """
    try:
        return Speed(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no constants of `dpg plan --calibrate --save FILE` ({error}).") from error


def work_of(workload: Workload) -> list[Work]:
    """The parts of a GRPO step, validations apart."""
    parts = []
    if workload.writer is not None:
        parts.append(_writing(workload, workload.writer))
    if workload.inner is not None:
        parts += _reward(workload.inner)
    if workload.writer is not None:
        parts.append(_learning(workload.writer))
    return parts


def forward_passes(inner: Inner) -> list[tuple[str, int]]:
    """Operations of the target's training in F, a forward pass over an inner step's texts (docs/theory.md, section 6).

    The metric's own gradient is not among them.
    """
    steps, metrics, cut = inner.num_steps, inner.num_metrics, inner.microbatch is not None
    if not inner.metagradient:
        return [("training", 3 * steps)]
    if steps == 1:
        return [("training", 3), ("the way back", (3 if cut else 2) * metrics)]
    plan = mg.Binomial(inner.slots).plan(steps)
    again = steps - 1 - (_with_gradient(plan, steps - 1) if cut else 0)
    # A gradient that is known is computed once more where its graph is needed; step 0 needs no Hessian product.
    back = (3 + 6 * metrics) * (steps - 1) + 3 * metrics if cut else 6 * metrics * (steps - 1) + 2 * metrics
    return [
        ("training", 3 * steps),
        ("replays", 3 * plan.cost.replayed),
        ("gradients again", 3 * again),
        ("the way back", back),
    ]


def _with_gradient(plan: Any, last: int) -> int:
    """Reversed steps before the `last` whose state comes straight from the store: their gradient was kept with it."""
    actions = [action for action in plan.reverse if kind(action) != "Drop"]
    pairs = zip(actions, actions[1:], strict=False)
    return sum(kind(a) == "Load" and kind(b) == "Reverse" and b.step < last for a, b in pairs)


def _writing(workload: Workload, writer: Writer) -> Work:
    shape, devices = writer.shape, workload.devices
    length = writer.prompt + writer.written
    num_tokens = writer.num_prompts * writer.prompt + writer.num_texts * writer.written
    rounds = ceil(devices.share(writer.num_texts) / drawn_at_once(writer, devices))
    # Every token of a round reads all weights, and on average half of the keys and values.
    cache = graphs.reading(shape, 1, length).held
    read = writer.written * (rounds * shape.num_params * FLOAT + devices.share(writer.num_texts) * cache / 2)
    told = f"F of {writer.num_texts} texts x {writer.written} tokens, {writer.num_prompts} prompts x {writer.prompt}"
    return Work("writing", told, num_tokens * graphs.operations(shape, length), read)


def _reward(inner: Inner) -> list[Work]:
    one = inner.batch * inner.length * graphs.operations(inner.shape, inner.length)
    unit = f"F of {inner.batch} texts x {inner.length} tokens"
    runs = f"{inner.num_runs} x " if inner.num_runs > 1 else ""
    parts = [
        Work(what, f"{runs}{count} {unit}", inner.num_runs * count * one)
        for what, count in forward_passes(inner)
        if count
    ]
    if inner.held_out.texts:
        held_out = inner.held_out
        # In several pieces each is evaluated twice.
        count = inner.num_metrics * (3 if held_out.texts <= held_out.at_once else 4)
        each = held_out.texts * held_out.length * graphs.operations(inner.shape, held_out.length)
        told = f"{runs}{count} F of {held_out.texts} texts x {held_out.length} tokens"
        parts.append(Work("Φ", told, inner.num_runs * count * each))
    return parts


def _learning(writer: Writer) -> Work:
    count, length = 3 + writer.has_reference + writer.own, writer.prompt + writer.written
    operations = count * writer.num_texts * length * graphs.operations(writer.shape, length)
    return Work("learning", f"{count} F of {writer.num_texts} texts x {length} tokens", operations)
