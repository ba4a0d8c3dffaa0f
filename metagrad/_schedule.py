"""Which states to keep and which to run again: integers only, no tensor in sight.

A plan is two lists of actions, before and after the metric. Reversing T steps and then knowing the metric is the
classical problem of reversing T + 1 steps of which the last is the metric [griewank2000], so `Binomial` is optimal.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import NamedTuple, TypeAlias


class Save(NamedTuple):
    """Keep the state in hand, which is `state_step`."""

    step: int


class Load(NamedTuple):
    """Take the kept `state_step` in hand."""

    step: int


class Run(NamedTuple):
    """Run steps start … stop − 1 on the state in hand."""

    start: int
    stop: int


class Reverse(NamedTuple):
    """Pull the cotangent back through `step`; the state in hand is `state_step`."""

    step: int


class Drop(NamedTuple):
    """Forget the kept `state_step`."""

    step: int


Action: TypeAlias = Save | Load | Run | Reverse | Drop


class Cost(NamedTuple):
    """Step evaluations of a plan, and the most states it keeps at a time."""

    forward: int
    replayed: int
    reversed: int
    states: int


class Plan(NamedTuple):
    """What to do before the metric is known, and after."""

    forward: list[Action]
    reverse: list[Action]

    @property
    def cost(self) -> Cost:
        """Evaluations and kept states, counted action by action."""
        kept = peak = 0
        for action in [*self.forward, *self.reverse]:
            kept += isinstance(action, Save) - isinstance(action, Drop)
            peak = max(peak, kept)
        reversals = sum(isinstance(action, Reverse) for action in self.reverse)
        return Cost(_steps_run(self.forward), _steps_run(self.reverse), reversals, peak)


class Schedule(ABC):
    """When to keep which state. Changes the cost of a metagradient, never its numbers."""

    @abstractmethod
    def plan(self, num_steps: int) -> Plan:
        """The actions that run `num_steps` steps and then reverse each once, last to first."""

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
        if not isinstance(self.slots, int) or self.slots < 1:
            raise ValueError(f"`slots` is {self.slots}, but the initial state needs one. Pass 1 or more, an integer.")

    def plan(self, num_steps: int) -> Plan:
        metric = Reverse(num_steps)
        actions = list(_reversal(0, num_steps + 1, self.slots))
        end = actions.index(metric)
        return Plan([Save(0), *actions[:end]], [*actions[end + 1 :], Drop(0)])


@dataclass(frozen=True)
class EveryStep(Schedule):
    """Every state kept: no replay, memory proportional to the number of steps."""

    def plan(self, num_steps: int) -> Plan:
        return Binomial(slots=max(num_steps, 1)).plan(num_steps)


def _reversal(start: int, stop: int, slots: int) -> Iterator[Action]:
    """Reverse steps start … stop − 1 with `state_start` kept in one of the `slots` and in hand."""
    while stop - start > 1:
        split = stop - 1 if slots == 1 else start + _split(stop - start, slots)
        yield Run(start, split)
        if slots == 1 or split == stop - 1:
            yield Reverse(split)
        else:
            yield Save(split)
            yield from _reversal(split, stop, slots - 1)
            yield Drop(split)
        yield Load(start)
        stop = split
    yield Reverse(start)


def _split(num_steps: int, slots: int) -> int:
    """The smallest optimal distance to the next kept state, by bisection: the cost is convex in it."""

    def cost(distance: int) -> int:
        return distance + _evaluations(num_steps - distance, slots - 1) + _evaluations(distance, slots)

    low, high = 1, num_steps - 1
    while low < high:
        middle = (low + high) // 2
        if cost(middle + 1) >= cost(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _evaluations(num_steps: int, slots: int) -> int:
    """The fewest runs that reverse `num_steps` steps: r·l − C(slots + r, r − 1) [griewank2000]."""
    if num_steps == 1:
        return 0
    sweeps = 1
    while comb(slots + sweeps, sweeps) < num_steps:
        sweeps += 1
    return sweeps * num_steps - comb(slots + sweeps, sweeps - 1)


def _steps_run(actions: list[Action]) -> int:
    return sum(action.stop - action.start for action in actions if isinstance(action, Run))
