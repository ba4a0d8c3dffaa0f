"""Whether a plan fits a device, and what to change until it does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from dpg.plan.lines import FLOAT, readable
from dpg.plan.memory import drawn_at_once, memory, rows_of, updated_at_once
from dpg.plan.workload import Workload

SPARE = 0.1
"""The share of a device's memory that a plan should leave: to the allocator, the kernels and the driver."""
RANK = 16
FEWER = (16, 4, 1)
MOST_DEVICES = 1024

Changed: TypeAlias = Callable[[Workload], Workload]


class Way(NamedTuple):
    """One thing to do otherwise, how to ask for it on the command line or in code, and what it makes of a plan."""

    what: str
    option: str
    changed: Changed


class Change(NamedTuple):
    """A way that was taken, and the most bytes at a time then."""

    what: str
    option: str
    peak: int


def fits(peak: int, capacity: int) -> bool:
    """Whether a plan leaves what it should."""
    return peak <= (1 - SPARE) * capacity


def verdict(workload: Workload) -> str | None:
    """One line; None where no memory was given to compare with."""
    capacity, found = workload.devices.capacity, memory(workload)
    if capacity is None:
        return None
    told = f"{readable(found.peak)} of {readable(capacity)}"
    if fits(found.peak, capacity):
        return f"fits: {told}"
    if found.peak <= capacity:
        return f"may fit: {told}, which leaves less than a tenth to the allocator, the kernels and the driver"
    return f"does not fit: {told}, {found.peak / capacity:.3g} times what is there"


def changes(workload: Workload) -> list[Change]:
    """What to change, one thing after the other, until the plan fits or nothing more is known."""
    capacity = workload.devices.capacity
    if capacity is None:
        return []
    taken, now = list[Way](), workload
    while not fits(memory(now).peak, capacity):
        way = next((way for way in _ways(now) if memory(way.changed(now)).peak < 0.98 * memory(now).peak), None)
        if way is None:
            break
        taken = [other for other in taken if _key(other) != _key(way)] + [way]  # Of one thing the last word.
        now = _after(workload, taken)
    for way in list(taken):  # What a later change made needless.
        others = [other for other in taken if other is not way]
        if fits(memory(_after(workload, others)).peak, capacity):
            taken = others
    steps = [taken[: number + 1] for number in range(len(taken))]
    return [Change(way[-1].what, way[-1].option, memory(_after(workload, way)).peak) for way in steps]


def vocabulary_share(workload: Workload) -> str | None:
    """A remark where logits are most of what a micro-batch holds; None where they are not."""
    inner = workload.inner
    if inner is None or inner.microbatch == 1:
        return None
    logits = FLOAT * rows_of(inner, workload.devices) * inner.length * inner.shape.vocabulary
    if 4 * logits < 0.3 * memory(workload).largest.bytes:
        return None
    return (
        f"Logits are a large part: {readable(logits)} each time they are held. A loss of your own can compute them in "
        "chunks of the vocabulary's tokens by mg.linear_cross_entropy (docs/speed.md)."
    )


def _key(way: Way) -> str:
    return way.option.split()[0]


def _after(workload: Workload, taken: Sequence[Way]) -> Workload:
    for way in taken:
        workload = way.changed(workload)
    return workload


def _set(part: str, **fields: Any) -> Changed:
    """`workload` with fields of its `inner`, `writer` or `devices` changed."""
    return lambda workload: replace(workload, **{part: replace(getattr(workload, part), **fields)})


def _ways(workload: Workload) -> Iterator[Way]:
    """Changes that may lower the largest phase. What changes the experiment comes late, what costs machines last."""
    largest, devices = memory(workload).largest.name, workload.devices
    if workload.inner is not None and largest in (
        "the target is trained",
        "the step is reversed",
        "a step is reversed",
    ):
        for count in _fewer(rows_of(workload.inner, devices)):
            option = f"--microbatch {count} (inner_microbatch_size)"
            yield Way(f"differentiate {_texts(count)} at a time", option, _set("inner", microbatch=count))
    if workload.inner is not None and largest == "Φ is differentiated":
        held_out = workload.inner.held_out
        for count in _fewer(min(devices.share(held_out.texts), held_out.at_once)):
            changed = _set("inner", held_out=held_out._replace(at_once=count))
            yield Way(f"evaluate Φ on {_texts(count)} at a time", f"HeldOutLoss microbatch_size={count}", changed)
    if workload.writer is not None and largest in ("prompts are read", "texts are drawn"):
        for count in _fewer(drawn_at_once(workload.writer, devices)):
            option = f"--generation-batch {count} (generation_batch_size)"
            yield Way(f"sample {_texts(count)} at a time", option, _set("writer", at_once=count))
    if workload.writer is not None and largest == "the generator learns":
        for count in _fewer(updated_at_once(workload.writer, devices)[0]):
            option = f"--policy-microbatch {count} (policy_microbatch_size)"
            yield Way(f"learn from {_texts(count)} at a time", option, _set("writer", microbatch=count))
    if devices.number > 1 and not devices.sharded:
        yield Way("divide parameters and states between GPUs", "--sharded", _set("devices", sharded=True))
    yield from _of_states(workload)
    yield from _of_generator(workload)
    number = devices.number
    while not devices.cpu and number < MOST_DEVICES:
        number *= 2
        changed = _set("devices", number=number, sharded=True)
        yield Way(f"divide all between {number} GPUs", f"--gpus {number} --sharded", changed)


def _texts(count: int) -> str:
    return "1 text" if count == 1 else f"{count} texts"


def _fewer(number: int) -> Iterator[int]:
    return (count for count in FEWER if count < number)


def _of_states(workload: Workload) -> Iterator[Way]:
    inner = workload.inner
    if inner is None or not inner.metagradient or inner.num_steps == 1 or inner.place != "device":
        return
    place, store = ("disk", "DiskStore") if workload.devices.cpu else ("pinned", "PinnedStore")
    where = "on disk" if place == "disk" else "in the host's memory"
    yield Way(f"keep states {where}", f"--states {place} (store=mg.{store}(...))", _set("inner", place=place))
    for slots in (number for number in (4, 2) if number < min(inner.slots, inner.num_steps)):
        option = f"--slots {slots} (schedule=mg.Binomial({slots}))"
        yield Way(f"keep {slots} states, and run more steps again", option, _set("inner", slots=slots))


def _of_generator(workload: Workload) -> Iterator[Way]:
    writer = workload.writer
    if writer is not None and writer.shape.num_learned == writer.shape.num_params:
        changed = _set("writer", shape=writer.shape.with_adapters(RANK))
        yield Way("train adapters of the generator", f"--lora-rank {RANK} (lora_rank)", changed)
    if writer is not None and writer.has_reference:
        changed = _set("writer", has_reference=False)
        yield Way("keep no reference generator", "--no-reference (kl_coefficient=0)", changed)
