"""Which states to keep and which to run again: integers only, no tensor in sight.

A plan is two lists of actions, before and after the metric. Reversing T steps and then knowing the metric is the
classical problem of reversing T + 1 steps of which the last is the metric [griewank2000], so `Binomial` is optimal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb

from metagrad._plan import Action, Cost, Drop, Load, Plan, Reverse, Run, Save


class Schedule(ABC):
    """When to keep which state. Changes the cost of a metagradient, never its numbers (but see `EveryStep`)."""

    num_graphs = 1
    """Steps at the end of the run whose graphs are kept until they are reversed."""

    @abstractmethod
    def reversal(self, start: int, stop: int, kept: int) -> Iterator[Action]:
        """Reverse steps start … stop − 1, last to first: `state_start` is in hand, and kept as the last of `kept`."""

    def plan(self, num_steps: int) -> Plan:
        """The actions that run `num_steps` steps and then reverse each once, last to first."""
        actions = [self.first(), *self.reversal(0, num_steps + 1, kept=1), Drop(0)]
        end = _metric_in(actions)
        return Plan(actions[:end], actions[end + 1 :], num_graphs=self.num_graphs)

    def first(self) -> Save:
        """How the initial state is kept."""
        return Save(0)

    def rest(self, num_steps: int, kept: Sequence[int], reversed_to: int | None) -> Plan:
        """The plan of a run that was cut off: `kept` states are left, ascending from 0.

        Args:
            reversed_to: the last step that was reversed, or None if the metric is not yet known.
        """
        stop = num_steps + 1 if reversed_to is None else reversed_to
        actions: list[Action] = []
        for number, start in reversed(list(enumerate(kept, start=1))):
            if start < stop:
                actions += [Load(start), *self.reversal(start, stop, kept=number)]
                stop = start
            actions.append(Drop(start))
        if reversed_to is not None:
            return Plan([], actions, len(kept))
        end = _metric_in(actions)
        return Plan(actions[:end], actions[end + 1 :], len(kept))

    def thinned(self, kept: Sequence[int], stop: int) -> list[int]:
        """Those of the `kept` states, ascending from 0, with which to go on reversing the steps before `stop`."""
        return list(kept)

    def cost(self, num_steps: int) -> Cost:
        """What `plan(num_steps)` costs, known before anything is trained."""
        return self.plan(num_steps).cost


@dataclass(frozen=True)
class Binomial(Schedule):
    """At most `slots` kept states, with the fewest possible replays [griewank2000].

    Args:
        slots: states kept at a time, the initial one among them; at least 1.

    Cost: with r the smallest integer for which C(slots + r, r) > T, no step is run more than r times, the forward run
    included. T ≤ slots needs no replay; 10 slots need 2.6 replays a step at T = 1000.
    """

    slots: int

    def __post_init__(self) -> None:
        refuse_count("slots", self.slots, 1, "the initial state needs one")

    def reversal(self, start: int, stop: int, kept: int) -> Iterator[Action]:
        # Never less than its own: a run cut off under more slots has more states left than fit.
        return binomial(start, stop, max(self.slots - kept + 1, 1))

    def thinned(self, kept: Sequence[int], stop: int) -> list[int]:
        return thinned(kept, stop, self.slots, lambda length, number: evaluations(length, max(self.slots - number, 1)))


@dataclass(frozen=True)
class EveryStep(Schedule):
    """Every state kept: no replay, memory proportional to the number of steps.

    Args:
        num_graphs: steps at the end of the run whose graphs are kept from the forward run until they are reversed; at
            least 1, for the last step's always is. 9 forward passes for each of them instead of 12, in the memory of an
            unrolled run besides the states. Refused with `resume`, and for a `TrainStep` that keeps no graph: with
            micro-batches, a `curvature` or compile=True. A gradient with a graph may differ from one without by
            rounding, so this one setting may change a number in its last bits.
    """

    num_graphs: int = 1

    def __post_init__(self) -> None:
        refuse_count("num_graphs", self.num_graphs, 1, "the last step's graph is always kept")

    def reversal(self, start: int, stop: int, kept: int) -> Iterator[Action]:
        return binomial(start, stop, stop - start)


def binomial(start: int, stop: int, slots: int) -> Iterator[Action]:
    """Reverse steps start … stop − 1 with `state_start` kept in one of the `slots` and in hand."""
    if slots >= stop - start:
        yield from _keep_all(start, stop)
        return
    while stop - start > 1:
        split = stop - 1 if slots == 1 else start + best_split(stop - start, slots)
        yield Run(start, split)
        if slots == 1 or split == stop - 1:
            yield Reverse(split)
        else:
            yield Save(split)
            yield from binomial(split, stop, slots - 1)
            yield Drop(split)
        yield Load(start)
        stop = split
    yield Reverse(start)


def _keep_all(start: int, stop: int) -> Iterator[Action]:
    """`binomial` where every state has a slot, without its recursion."""
    for step in range(start, stop - 1):
        yield Run(step, step + 1)
        if step + 1 < stop - 1:
            yield Save(step + 1)
    yield Reverse(stop - 1)
    for step in range(stop - 2, start - 1, -1):
        yield Load(step)
        yield Reverse(step)
        if step > start:
            yield Drop(step)


def best_split(num_steps: int, slots: int) -> int:
    """The smallest optimal distance to the next kept state, for two slots or more; the cost is convex in it."""

    def cost(distance: int) -> int:
        return distance + evaluations(num_steps - distance, slots - 1) + evaluations(distance, slots)

    low, high = 1, num_steps - 1
    while low < high:
        middle = (low + high) // 2
        if cost(middle + 1) >= cost(middle):
            high = middle
        else:
            low = middle + 1
    return low


def evaluations(num_steps: int, slots: int) -> int:
    """The fewest runs that reverse `num_steps` steps: r·l − C(slots + r, r − 1) [griewank2000]."""
    if num_steps == 1:
        return 0
    sweeps = 1
    while comb(slots + sweeps, sweeps) < num_steps:
        sweeps += 1
    return sweeps * num_steps - comb(slots + sweeps, sweeps - 1)


def thinned(kept: Sequence[int], stop: int, most: int, cost: Callable[[int, int], float]) -> list[int]:
    """The cheapest to go on with of the `kept` states before `stop`: too many early ones leave no slot for the rest.

    Args:
        most: states to go on with at most, but the first and the last in any case.
        cost: of reversing so many steps from a kept state with so many other states kept.
    """

    def in_all(left: list[int]) -> float:
        return sum(cost(end - start, number) for number, (start, end) in enumerate(pairwise([*left, stop])))

    left = [step for step in kept if step < stop]
    choices = [left]
    while len(left) > 2:
        gaps = [after - before for before, after in zip(left, left[2:], strict=False)]
        gone = 1 + gaps.index(min(gaps))
        left = [*left[:gone], *left[gone + 1 :]]
        choices.append(left)
    return min((left for left in choices if len(left) <= max(most, 2)), key=in_all)


def refuse_count(name: str, value: int, least: int, why: str) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` is {value}, but {why}. Pass an integer, {least} or more.")


def _metric_in(actions: list[Action]) -> int:
    """Where the metric is evaluated: the first reversal, of the step after the last."""
    return next(number for number, action in enumerate(actions) if isinstance(action, Reverse))
