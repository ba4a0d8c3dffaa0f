"""Bytes on one device in every phase of a run: docs/plan.md has the arithmetic in words.

`p` is the number of the target's parameters and a state is p·(1 + num_moments) numbers, as everywhere in metagrad.
"""

from typing import NamedTuple

import metagrad as mg
from dpg.plan import graphs
from dpg.plan.lines import FLOAT, Line, Memory, Phase, counted, kind, product
from dpg.plan.workload import Devices, Inner, Workload, Writer


class Alive(NamedTuple):
    """What is there of a run when a step is reversed: states, and gradients kept beside them."""

    states: int
    gradients: int


def memory(workload: Workload) -> Memory:
    """All phases of a run. Learned from the code of a step, and checked against it by benchmarks/plan.py."""
    inner, writer, devices = workload.inner, workload.writer, workload.devices
    always: list[Line] = []
    phases: list[Phase] = []
    if writer is not None:
        always += _learner(writer, devices)
        phases += [_reading(writer, devices), _drawing(writer, devices)]
    if inner is not None:
        always.append(product("target's weights", inner.shape.num_params, over=_over(devices)))
        phases += _training(inner, devices)
    if writer is not None:
        phases += [_learning(writer, inner, devices), _saving(writer, devices)]
    return Memory(Phase("all the time", always), phases)


def elsewhere(workload: Workload) -> Line | None:
    """The states that are kept beside the device, by device; None where there are none."""
    inner, devices = workload.inner, workload.devices
    if inner is None or inner.place == "device" or not inner.metagradient or inner.num_steps == 1:
        return None
    slots = min(inner.slots, inner.num_steps)
    numbers = slots * (1 + inner.num_moments) + (slots - 1 if inner.microbatch else 0)
    where = "on disk" if inner.place == "disk" else "in the host's pinned memory"
    return product(f"{slots} kept states {where}", numbers, inner.shape.num_learned, over=_over(devices))


def alive_at_reversal(num_steps: int, slots: int, num_moments: int, keeps_gradients: bool) -> Alive:
    """The most that a run with so many slots has at a time while a step is reversed, by its plan.

    The initial state and the trained one are there to the end: they are the caller's and the result.
    """
    plan = mg.Binomial(slots).plan(num_steps)
    kept: set[int] = set()
    found = []
    for action in [*plan.forward, *plan.reverse]:
        match kind(action):
            case "Save":
                kept.add(action.step)
            case "Drop":
                kept.discard(action.step)
            case "Reverse":
                # The last step's gradient comes with its state, which is in hand.
                gradients = len(kept - {num_steps - 1}) if keeps_gradients else 0
                found.append(Alive(len(kept | {0, action.step, num_steps}), gradients))
    return max(found, key=lambda each: each.states * (1 + num_moments) + each.gradients)


def rows_of(inner: Inner, devices: Devices) -> int:
    """Texts of the target that one device differentiates at a time."""
    return min(inner.microbatch or inner.batch, devices.share(inner.batch))


def updated_at_once(writer: Writer, devices: Devices) -> tuple[int, bool]:
    """Texts of an update that one device differentiates at a time, and whether these are all."""
    texts = -(-devices.share(writer.num_texts) // writer.updates)
    rows = min(writer.microbatch or texts, texts)
    return rows, rows == texts


def drawn_at_once(writer: Writer, devices: Devices) -> int:
    """Texts that one device samples at a time."""
    texts = devices.share(max(writer.num_texts, writer.validated))
    return min(writer.at_once or texts, texts)


def _over(devices: Devices) -> int:
    return devices.number if devices.sharded else 1


def _learner(writer: Writer, devices: Devices) -> list[Line]:
    shape, over = writer.shape, _over(devices)
    lines = [
        product("generator's weights", shape.num_params, over=over),
        product("generator's gradient", shape.num_learned, over=over),
        product("generator's Adam state", 2, shape.num_learned, over=over),
    ]
    return lines + ([product("reference of the KL", shape.num_params, over=over)] if writer.has_reference else [])


def _reading(writer: Writer, devices: Devices) -> Phase:
    prompts = min(max(writer.num_prompts, writer.validated), drawn_at_once(writer, devices))
    graph = graphs.reading(writer.shape, prompts, writer.prompt)
    lines = [counted("keys, values, activations", f"{prompts} prompts of {writer.prompt} tokens", graph.peak)]
    return Phase("prompts are read", lines + _gathered(writer.shape.largest_block, 1, devices))


def _drawing(writer: Writer, devices: Devices) -> Phase:
    rows, length = drawn_at_once(writer, devices), writer.prompt + writer.written
    cache = graphs.reading(writer.shape, 1, length).held
    lines = [
        product("keys and values", rows, length, -(-cache // (FLOAT * length))),
        product("logits, in 5 forms", 5, rows, writer.shape.vocabulary),
    ]
    return Phase("texts are drawn", lines + _gathered(writer.shape.largest_block, 1, devices))


def _training(inner: Inner, devices: Devices) -> list[Phase]:
    if not inner.metagradient:
        return [_trained(inner, devices)]
    return [*_metric(inner, devices), _reversal(inner, devices)]


def _trained(inner: Inner, devices: Devices) -> Phase:
    """Training alone, as baselines and validations do."""
    rows, p = rows_of(inner, devices), inner.shape.num_learned
    graph = graphs.first_order(inner.shape, rows, inner.length, fused=False)
    lines = [
        product("state, and the next one", 2 * (1 + inner.num_moments), p, over=_over(devices)),
        product("gradient", p, over=_over(devices)),
        counted("activations", _told(rows, inner.length), _walked(graph, devices)),
    ]
    return Phase("the target is trained", lines + _gathered(inner.shape.largest_block, 2, devices))


def _states(inner: Inner, devices: Devices) -> list[Line]:
    """The states on the device when a step is reversed, the gradients beside them, and results of other runs."""
    p, over, numbers = inner.shape.num_learned, _over(devices), 1 + inner.num_moments
    if inner.num_steps == 1:
        alive = Alive(2, 0)
    elif inner.place == "device":
        alive = alive_at_reversal(inner.num_steps, inner.slots, inner.num_moments, inner.microbatch is not None)
    else:  # The initial one, the one in hand, the trained one, and one that is read ahead.
        alive = Alive(min(inner.num_steps + 1, 4), 1 if inner.microbatch else 0)
    # Adam's two moments are one tensor of zeros at the start.
    lines = [
        product(f"{alive.states} states", alive.states * numbers - (inner.num_moments > 1), p, over=over),
    ]
    if alive.gradients:
        lines.append(product("gradients kept with states", alive.gradients, p, over=over))
    if inner.num_runs > 1:
        lines.append(product("trained weights of all runs", inner.num_runs, p, over=over))
    return lines


def _metric(inner: Inner, devices: Devices) -> list[Phase]:
    held_out = inner.held_out
    texts, length = min(devices.share(held_out.texts), held_out.at_once), held_out.length
    if not texts:
        return []
    lines = [*_states(inner, devices), product("gradient", inner.shape.num_learned, over=_over(devices))]
    if inner.microbatch is None:
        rows = rows_of(inner, devices)
        held = graphs.second_order(inner.shape, rows, inner.length, 1, inner.num_steps > 1).held
        lines.append(counted("graph of the last step", _told(rows, inner.length), held))
    graph = graphs.first_order(inner.shape, texts, length, fused=True)
    lines.append(counted("graph of Φ and its gradient", _told(texts, length), graph.peak))
    return [Phase("Φ is differentiated", lines + _gathered(inner.shape.largest_block, 2, devices))]


def _reversal(inner: Inner, devices: Devices) -> Phase:
    p, over, metrics = inner.shape.num_learned, _over(devices), inner.num_metrics
    rows, cut = rows_of(inner, devices), inner.microbatch is not None
    told, several = _told(rows, inner.length), cut and devices.share(inner.batch) > rows
    one = inner.num_steps == 1
    lines = [
        *_states(inner, devices),
        product("adjoint", metrics, 1 if one else 1 + inner.num_moments, p, over=over),
        product("gradient", p, over=over),
        product("its cotangent", metrics, p, over=over),
    ]
    if one and cut:
        lines.append(counted("forward mode", told, graphs.forward_mode(inner.shape, rows, inner.length).peak))
        return Phase("the step is reversed", lines + _gathered(inner.shape.largest_block, 3, devices))
    graph = graphs.second_order(inner.shape, rows, inner.length, metrics, not one)
    if not one:
        lines.append(product("Hessian products", metrics * (2 if several else 1), p, over=over))
    if cut:
        lines.append(product("gradient of a micro-batch", p, over=over))
    lines.append(counted("activations of the gradient", told, graph.held))
    more = _walked(graph, devices) - graph.held
    lines.append(counted("its way back" if more >= 0 else "of which freed by then", told, more))
    name = "the step is reversed" if one else "a step is reversed"
    return Phase(name, lines + _gathered(inner.shape.largest_block, 3, devices))


def _learning(writer: Writer, inner: Inner | None, devices: Devices) -> Phase:
    rows, whole = updated_at_once(writer, devices)
    graph = graphs.policy(writer.shape, rows, writer.prompt, writer.written, writer.entropy)
    rest = _walked(graph, devices)
    told = f"{rows} texts x {writer.prompt + writer.written} tokens"
    lines = [counted("activations and logits", told, rest if whole else max(graph.held, rest))]
    if inner is not None:
        lines.append(product("trained target's weights", inner.shape.num_learned, over=_over(devices)))
    return Phase("the generator learns", lines + _gathered(writer.shape.largest_block, 2, devices))


def _saving(writer: Writer, devices: Devices) -> Phase:
    size = writer.shape.num_params + 2 * writer.shape.num_learned
    lines = [product("copy of weights and Adam state", size, over=_over(devices))]
    if devices.cpu:
        lines.append(product("the file, made in memory", 2, size))
    return Phase("a checkpoint is saved", lines)


def _walked(graph: graphs.Graph, devices: Devices) -> int:
    """The most that a graph and its way back take besides what they make, which has lines of its own.

    What is made grows while the graph is freed, so this may be less than the graph. But not where each device keeps a
    small part of what is made.
    """
    rest = graph.peak - graph.made
    return rest if _over(devices) == 1 else max(rest, graph.held)


def _gathered(block: int, copies: int, devices: Devices) -> list[Line]:
    """Where parameters are divided: the largest block whole, with cotangent and gradient where there are any."""
    return [product("largest block, gathered", copies, block)] if devices.sharded and devices.number > 1 else []


def _told(texts: int, length: int) -> str:
    return f"{texts} texts x {length} tokens"
