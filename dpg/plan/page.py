"""A plan for a person, every line with its arithmetic, and for a program."""

from typing import Any

from dpg.plan.advice import changes, fits, verdict, vocabulary_share
from dpg.plan.lines import Line, Memory, Phase, readable
from dpg.plan.memory import elsewhere, memory
from dpg.plan.speed import ASSUMED_SHARE, Speed, Work, work_of
from dpg.plan.workload import Workload

WHAT, HOW, SIZE = 44, 57, 12


def page(workload: Workload, speed: Speed | None) -> str:
    """The whole plan as text."""
    found = memory(workload)
    parts = [_head(workload), _bytes(workload, found), _outcome(workload), _time(workload, speed)]
    return "\n\n".join(part for part in parts if part)


def as_dict(workload: Workload, speed: Speed | None) -> dict[str, Any]:
    """The same for a program: bytes, operations, seconds."""
    found, capacity, works = memory(workload), workload.devices.capacity, work_of(workload)
    other = elsewhere(workload)
    count = workload.devices.number
    return {
        "name": workload.name,
        "gpus": count,
        "sharded": workload.devices.sharded,
        "gpu_memory": capacity,
        "always": _phase(found.always),
        "phases": [_phase(phase) for phase in found.phases],
        "elsewhere": None if other is None else other._asdict(),
        "largest_phase": found.largest.name,
        "peak_bytes": found.peak,
        "fits": None if capacity is None else fits(found.peak, capacity),
        "verdict": verdict(workload),
        "changes": [
            {"what": change.what, "option": change.option, "peak_bytes": change.peak} for change in changes(workload)
        ],
        "work": [
            {**work._asdict(), "seconds": None if speed is None else speed.seconds(work, count)} for work in works
        ],
        "operations": sum(work.operations for work in works),
        "seconds": None if speed is None else sum(speed.seconds(work, count) for work in works),
        "constants": None if speed is None else {**vars(speed)},
    }


def _phase(phase: Phase) -> dict[str, Any]:
    return {"name": phase.name, "bytes": phase.bytes, "lines": [line._asdict() for line in phase.lines]}


def _head(workload: Workload) -> str:
    inner, writer, devices = workload.inner, workload.writer, workload.devices
    lines = [workload.name] if workload.name else []
    if inner is not None:
        cut = "" if inner.microbatch is None else f", {inner.microbatch} at a time"
        lines.append(
            f"target     {inner.shape.name}: {inner.shape.num_params:,} parameters; {inner.num_steps} inner steps on "
            f"{inner.batch} texts of {inner.length} tokens{cut}; metrics: {inner.num_metrics}"
        )
    if writer is not None:
        lines.append(
            f"generator  {writer.shape.name}: {writer.shape.num_params:,} parameters, {writer.shape.num_learned:,} "
            f"learn; {writer.num_texts} texts of {writer.written} tokens after prompts of {writer.prompt}"
        )
    if devices.number > 1:
        how = "each with a part of parameters and states" if devices.sharded else "each with all parameters and states"
        lines.append(f"devices    {devices.number}, {how}. This is arithmetic: dpg itself runs on one device")
    return "\n".join(lines)


def _bytes(workload: Workload, found: Memory) -> str:
    lines = [_row("bytes on one device, float32", "", "")]
    for phase in (found.always, *found.phases):
        lines.append(_row(phase.name if phase is found.always else f"while {phase.name}", "", ""))
        lines += [_line(line) for line in phase.lines]
        lines.append(_row("  in all", "", readable(phase.bytes)))
    lines.append(_row(f"peak, while {found.largest.name}", "", readable(found.peak)))
    if (other := elsewhere(workload)) is not None:
        lines += [_row("besides, for each device", "", ""), _line(other)]
    return "\n".join(lines)


def _line(line: Line) -> str:
    return _row(f"  {line.what}", line.arithmetic, f"= {readable(line.bytes)}")


def _row(what: str, how: str, size: str) -> str:
    return f"{what:<{WHAT}} {how:<{HOW}} {size:>{SIZE}}".rstrip()


def _outcome(workload: Workload) -> str | None:
    told = verdict(workload)
    if told is None:
        return None
    lines, found = [told], changes(workload)
    if found:
        lines.append("What to change, one after the other:")
        lines += [f"  {_row(change.what, change.option, readable(change.peak))}" for change in found]
    capacity = workload.devices.capacity
    if capacity is not None and not fits(found[-1].peak if found else memory(workload).peak, capacity):
        lines.append("That is not enough, and nothing more is known. Choose a smaller model, or a shorter sequence.")
    if not told.startswith("fits") and (remark := vocabulary_share(workload)) is not None:
        lines.append(remark)
    return "\n".join(lines)


def _time(workload: Workload, speed: Speed | None) -> str:
    works, count = work_of(workload), workload.devices.number
    lines = [_row("operations of a GRPO step", "", "" if speed is None else "seconds")]
    for work in works:
        lines.append(_row(f"  {work.what}", _told(work), "" if speed is None else f"{speed.seconds(work, count):.3g}"))
    seconds = "" if speed is None else f"{sum(speed.seconds(work, count) for work in works):.3g}"
    lines.append(_row("  in all", f"{sum(work.operations for work in works):.2e}", seconds))
    return "\n".join([*lines, *_constants(workload, speed)])


def _told(work: Work) -> str:
    return f"{work.arithmetic} = {work.operations:.2e}"


def _constants(workload: Workload, speed: Speed | None) -> list[str]:
    if speed is None:
        return ["Seconds are not known: pass --calibrate to measure this device, or --flops for another."]
    share = f"{speed.share:.2g}" + (" (assumed; --share)" if speed.source == "given" and _assumed(speed) else "")
    lines = [f"At {speed.flops:.3g} operations a second ({speed.source}), of which {share} are reached."]
    if workload.writer is not None and speed.bandwidth is None:
        lines.append("Writing is counted as arithmetic alone, a lower bound: --bandwidth gives its memory's part.")
    elif workload.writer is not None:
        lines.append(f"Writing reads weights and keys at {speed.bandwidth:.3g} bytes a second, and no faster.")
    if workload.devices.number > 1:
        lines.append("Devices are taken to divide the work evenly, and to exchange what they share in no time.")
    return lines


def _assumed(speed: Speed) -> bool:
    return speed.share == ASSUMED_SHARE
