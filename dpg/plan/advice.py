"""Whether a plan fits a device, and what to change until it does."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from dpg.plan.lines import FLOAT, readable
from dpg.plan.memory import drawn_at_once, memory, rows_of, updated_at_once
from dpg.plan.workload import Inner, Workload, Writer

SPARE = 0.1
"""The share of a device's memory that a plan should leave: to the allocator, the kernels and the driver."""
RANK = 16
FEWER = (16, 4, 1)
MOST_DEVICES = 1024


class Change(NamedTuple):
    """One thing to do otherwise, how to ask for it, and the most bytes at a time when it is done, too."""

    what: str
    option: str
    workload: Workload
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
    capacity, found = workload.devices.capacity, []
    peak = memory(workload).peak
    while capacity is not None and not fits(peak, capacity):
        possible = (Change(*way, memory(way[2]).peak) for way in _ways(workload))
        change = next((each for each in possible if each.peak < 0.98 * peak), None)
        if change is None:
            break
        workload, peak = change.workload, change.peak
        if found and found[-1].option.split()[0] == change.option.split()[0]:
            found.pop()  # The same thing, and more of it.
        found.append(change)
    return found


def _ways(workload: Workload) -> Iterator[tuple[str, str, Workload]]:
    """Changes that may lower the largest phase, the cheapest first."""
    largest, inner, writer = memory(workload).largest.name, workload.inner, workload.writer
    if inner is not None and largest in ("the target is trained", "the step is reversed", "a step is reversed"):
        yield from _of_target(workload, inner)
    if inner is not None and largest == "Φ is differentiated":
        yield from _of_metric(workload, inner)
    if writer is not None and largest in ("prompts are read", "texts are drawn"):
        for count in (number for number in FEWER if number < drawn_at_once(writer, workload.devices)):
            changed = replace(workload, writer=replace(writer, at_once=count))
            yield f"sample {count} texts at a time", f"--generation-batch {count} (generation_batch_size)", changed
    if writer is not None and largest == "the generator learns":
        for count in (number for number in FEWER if number < updated_at_once(writer, workload.devices)[0]):
            changed = replace(workload, writer=replace(writer, microbatch=count))
            yield (
                f"learn from {count} texts at a time",
                f"--policy-microbatch {count} (policy_microbatch_size)",
                changed,
            )
    # What changes the experiment, and what costs machines, comes last.
    if workload.devices.number > 1 and not workload.devices.sharded:
        changed = replace(workload, devices=replace(workload.devices, sharded=True))
        yield "divide parameters and states between GPUs", "--sharded", changed
    if inner is not None and inner.metagradient and inner.num_steps > 1 and inner.place == "device":
        yield from _of_states(workload, inner)
    if writer is not None:
        yield from _of_generator(workload, writer)
    yield from _more_devices(workload)


def _of_target(workload: Workload, inner: Inner) -> Iterator[tuple[str, str, Workload]]:
    for count in (number for number in FEWER if number < rows_of(inner, workload.devices)):
        changed = replace(workload, inner=replace(inner, microbatch=count))
        yield f"differentiate {count} texts at a time", f"--microbatch {count} (inner_microbatch_size)", changed


def _of_states(workload: Workload, inner: Inner) -> Iterator[tuple[str, str, Workload]]:
    for slots in (number for number in (4, 2) if number < min(inner.slots, inner.num_steps)):
        changed = replace(workload, inner=replace(inner, slots=slots))
        option = f"--slots {slots} (schedule=mg.Binomial({slots}))"
        yield f"keep {slots} states, and run more steps again", option, changed
    place, store = ("disk", "DiskStore") if workload.devices.cpu else ("pinned", "PinnedStore")
    where = "on disk" if place == "disk" else "in the host's pinned memory"
    changed = replace(workload, inner=replace(inner, place=place))
    yield f"keep states {where}", f"--states {place} (store=mg.{store}(...))", changed


def _of_metric(workload: Workload, inner: Inner) -> Iterator[tuple[str, str, Workload]]:
    rows = min(workload.devices.share(inner.held_out.texts), inner.held_out.at_once)
    for count in (number for number in (64, *FEWER) if number < rows):
        changed = replace(workload, inner=replace(inner, held_out=inner.held_out._replace(at_once=count)))
        yield f"evaluate {count} held-out texts at a time", f"HeldOutLoss(microbatch_size={count})", changed


def _of_generator(workload: Workload, writer: Writer) -> Iterator[tuple[str, str, Workload]]:
    if writer.shape.num_learned == writer.shape.num_params:
        changed = replace(workload, writer=replace(writer, shape=writer.shape.with_adapters(RANK)))
        yield "train adapters of the generator", f"--lora-rank {RANK} (lora_rank)", changed
    if writer.has_reference:
        changed = replace(workload, writer=replace(writer, has_reference=False))
        yield "keep no reference generator", "--no-reference (kl_coefficient=0)", changed


def _more_devices(workload: Workload) -> Iterator[tuple[str, str, Workload]]:
    number = workload.devices.number
    while not workload.devices.cpu and number < MOST_DEVICES:
        number *= 2
        changed = replace(workload, devices=replace(workload.devices, number=number, sharded=True))
        yield f"divide them between {number} GPUs", f"--gpus {number} --sharded", changed


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
