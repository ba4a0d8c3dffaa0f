"""Where the time of one reversed step goes, by torch's profiler.

    python -m benchmarks.step
    python -m benchmarks.step --model llama-7M --optimizer sgd --compile --threads 1

Every moment of the step is counted once, for the operation that is innermost at it: an operation's own time is without
that of the operations it calls. Groups are told apart by the function of metagrad that an operation was called from,
and within the model by the operation's name. The gradient comes before the cotangents are known, the pullback after.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import metagrad as mg
from benchmarks.peers.attempt import Clock
from benchmarks.peers.cases import Case
from benchmarks.peers.ours import compiled, step_of
from benchmarks.peers.plain import plain
from benchmarks.peers.tasks import MODELS, Task

# Of three steps the second is reversed in full: the gradient of the last one is part of the forward run.
NUM_STEPS, WHICH, NUM_TOP = 3, 1, 4
REVERSED, LINEARIZED = r"metagrad/_replay\.py\(\d+\): _pulled$", r"metagrad/_replay\.py\(\d+\): _linearize$"

PRODUCTS, ATTENTION = "matrix products, convolutions", "attention"
OTHERS, KERNELS = "other operations of the model", "kernels of torch.compile"
UPDATE, CHECKS, ENGINE = "update and its pullback", "checks", "Python, autograd's engine"
GROUPS = [PRODUCTS, ATTENTION, OTHERS, KERNELS, UPDATE, CHECKS, ENGINE]

COMPILED = r"CompiledFxGraph"
CALLERS = rf"metagrad/|{COMPILED}"
# The group of what was called, directly or not, from a function that fits; the first one counts.
BY_CALLER = {
    r"metagrad/(_refusals|_witness)\.py|: (_check_finite|not_finite|_batch)$": CHECKS,
    r"metagrad/(optim|_elementwise|_block|_kernels|_rules|_fused|_transformation|_groups|_muon|_adapter)\.py": UPDATE,
}
# The group of the others by their own name. Products of batches of matrices occur in attention alone.
BY_NAME = {
    r"^aten::(mm|addmm|.*convolution.*)$": PRODUCTS,
    r"^aten::(bmm|baddbmm|.*scaled_dot_product.*|softmax|_safe_softmax|_softmax.*)$": ATTENTION,
    r"^aten::": OTHERS,
    COMPILED: KERNELS,
}


@dataclass
class Spent:
    """Milliseconds in the gradient and in the pullback, and how often."""

    gradient: float = 0.0
    pullback: float = 0.0
    calls: int = 0

    @property
    def total(self) -> float:
        return self.gradient + self.pullback


def profiled(task: Task, case: Case, compile_step: bool) -> list[Any]:
    """The tree of events of a metagradient, made once before so that everything is warm."""
    step = step_of(task, case)
    step = compiled(step) if compile_step else step

    def run() -> None:
        mg.metagradient(
            lambda state: task.metric(state.params),
            step,
            task.initial(),
            task.batches,
            {"weights": task.weights()},
            schedule=mg.EveryStep(),
            wrt_params=True,
        )

    run()
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = recorded.profiler.kineto_results.experimental_event_tree()
    return events


def reversed_step(events: Sequence[Any]) -> Any:
    """The event of one reversed step."""
    found = [event for event, _ in _walked(events) if re.search(REVERSED, event.name)]
    assert len(found) == NUM_STEPS, f"{len(found)} reversed steps instead of {NUM_STEPS}: see REVERSED"
    return found[WHICH]


def spent_in(step: Any) -> dict[str, dict[str, Spent]]:
    """What each operation of each group took."""
    groups: dict[str, dict[str, Spent]] = defaultdict(lambda: defaultdict(Spent))
    for event, callers in _walked([step]):
        own = (event.duration_time_ns - sum(child.duration_time_ns for child in event.children)) / 1e6
        group = _group(event.name, callers)
        operation = event.name if any(re.search(pattern, event.name) for pattern in BY_NAME) else "Python"
        spent = groups[group][operation]
        spent.calls += operation != "Python"
        if any(re.search(LINEARIZED, caller) for caller in callers):
            spent.gradient += own
        else:
            spent.pullback += own
    return groups


def _walked(events: Sequence[Any]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every event, with those of CALLERS from which it was called, itself included if it is one."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(event, ()) for event in events]
    while waiting:
        event, callers = waiting.pop()
        callers = (*callers, event.name) if re.search(CALLERS, event.name) else callers
        yield event, callers
        waiting += [(child, callers) for child in reversed(event.children)]


def _group(name: str, callers: Sequence[str]) -> str:
    for pattern, group in BY_CALLER.items():
        if any(re.search(pattern, caller) for caller in callers):
            return group
    # The calls of compiled kernels are no operations of torch.
    rest = KERNELS if any(re.search(COMPILED, caller) for caller in callers) else ENGINE
    return next((group for pattern, group in BY_NAME.items() if re.search(pattern, name)), rest)


def show(groups: dict[str, dict[str, Spent]], whole: float) -> None:
    """Print the groups, and the longest operations of each."""
    print(f"{'milliseconds':38s} {'gradient':>9s} {'pullback':>9s} {'share':>7s} {'calls':>7s}")
    for group in GROUPS:
        operations = sorted(groups[group].items(), key=lambda item: -item[1].total)
        _line(group, [spent for _, spent in operations], whole)
        for name, spent in operations[: NUM_TOP if group != ENGINE else 0]:
            _line(f"  {name[-36:]}", [spent], whole)


def _line(label: str, spent: Sequence[Spent], whole: float) -> None:
    gradient, pullback = sum(each.gradient for each in spent), sum(each.pullback for each in spent)
    calls = sum(each.calls for each in spent)
    print(f"{label:38s} {gradient:9.1f} {pullback:9.1f} {(gradient + pullback) / whole:7.1%} {calls:7d}")


def plain_milliseconds(task: Task, case: Case) -> float:
    """One step of plain training: the median of five runs."""
    attempt, times = plain(task, case), []
    for _ in range(6):
        clock = Clock()
        attempt(clock)
        times.append(1e3 * clock.seconds / NUM_STEPS)
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description="Where the time of one reversed step goes.")
    parser.add_argument("--model", choices=[model.name for model in MODELS], default="gpt2-7M")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--pieces", type=int, default=1, help="micro-batches in a batch")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = next(model for model in MODELS if model.name == given.model)
    case = Case(model, given.optimizer, NUM_STEPS, given.pieces)
    task = Task.of(model, NUM_STEPS, "cpu")
    usual = plain_milliseconds(task, case)
    step = reversed_step(profiled(task, case, given.compile))
    whole = step.duration_time_ns / 1e6
    print(f"{case}{', compiled' if given.compile else ''}; torch {torch.__version__}, {given.threads} threads")
    print(f"one step reversed: {whole:.1f} ms, {whole / usual:.1f} plain steps of {usual:.1f} ms\n")
    show(spent_in(step), whole)


if __name__ == "__main__":
    main()
