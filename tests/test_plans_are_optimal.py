"""Plans: orders written by hand, the law every plan obeys, and the least cost known for each."""

from functools import cache

import pytest
from checkpoint_schedules import Forward, Revolve
from hypothesis import given
from hypothesis import strategies as st

import metagrad as mg
from metagrad._plan import Drop, Load, Plan, Reverse, Run, Save


def reversal(schedule: mg.Schedule, num_steps: int) -> list[int]:
    """Every step run or reversed after the forward run, in order."""
    order: list[int] = []
    for action in schedule.plan(num_steps).reverse:
        match action:
            case Run(start, stop):
                order.extend(range(start, stop))
            case Reverse(step):
                order.append(step)
    return order


@pytest.mark.parametrize(
    "schedule, num_steps, wanted",
    [
        # One step: state 0 is kept, so it is reversed at once.
        (mg.Binomial(1), 1, [0]),
        # Only state 0: steps 0 … t − 1 are run again for each t. Quadratic.
        (mg.Binomial(1), 4, [0, 1, 2, 3, 0, 1, 2, 0, 1, 0]),
        # As many slots as steps, or more: nothing is run again.
        (mg.Binomial(4), 4, [3, 2, 1, 0]),
        (mg.Binomial(9), 4, [3, 2, 1, 0]),
        (mg.EveryStep(), 5, [4, 3, 2, 1, 0]),
        # States 0 and 1 (keeping 2 instead also costs one run; the nearer one is chosen): 1 is run to reach state 2.
        (mg.Binomial(2), 3, [1, 2, 1, 0]),
        # States 0 and 3: run 3 to reverse 4; then the slot of 3 is free, and keeps 1 on the way to state 2.
        (mg.Binomial(2), 5, [3, 4, 3, 0, 1, 2, 1, 0]),
        # States 0, 1 and 2 with 4 steps: only state 3 is missing. (0, 1, 3 or 0, 2, 3 cost one run too, but later.)
        (mg.Binomial(3), 4, [2, 3, 2, 1, 0]),
        # States 0, 2 and 5: run 5 to reverse 6. The slot of 5 then keeps 3 on the way from 2 to 4.
        (mg.Binomial(3), 7, [5, 6, 5, 2, 3, 4, 3, 2, 0, 1, 0]),
    ],
)
def test_order_written_by_hand(schedule, num_steps, wanted):
    assert reversal(schedule, num_steps) == wanted


def test_a_whole_plan_written_by_hand():
    assert mg.Binomial(2).plan(3) == Plan(
        forward=[Save(0), Run(0, 1), Save(1), Run(1, 3)],
        reverse=[Load(1), Run(1, 2), Reverse(2), Load(1), Reverse(1), Drop(1), Load(0), Reverse(0), Drop(0)],
    )
    # 3 steps forward, 1 again, 3 reversed, 2 states.
    assert mg.Binomial(2).cost(3) == (3, 1, 3, 2, 0)


def check_law(plan: Plan, num_steps: int, slots: int) -> None:
    """Walk through a plan with a set of kept states and the number of the state in hand."""
    kept: set[int] = set()
    hand, awaited, metric_known = 0, num_steps - 1, False
    for action in [*plan.forward, None, *plan.reverse]:
        match action:
            case None:
                assert hand == num_steps, "the metric needs the last state"
                metric_known = True
            case Save(step):
                assert step == hand and step not in kept
                kept.add(step)
                assert len(kept) <= slots
            case Load(step):
                assert step in kept
                hand = step
            case Run(start, stop):
                assert start == hand < stop
                hand = stop
            case Reverse(step):
                assert metric_known and step == hand == awaited
                awaited -= 1
            case Drop(step):
                kept.remove(step)
    assert awaited == -1 and not kept


@given(num_steps=st.integers(1, 120), slots=st.integers(1, 12))
def test_binomial_reverses_every_step_once_within_its_slots(num_steps, slots):
    check_law(mg.Binomial(slots).plan(num_steps), num_steps, slots)


@given(num_steps=st.integers(1, 120))
def test_every_step_reverses_every_step_once_without_replay(num_steps):
    check_law(mg.EveryStep().plan(num_steps), num_steps, slots=num_steps)
    assert mg.EveryStep().cost(num_steps) == (num_steps, 0, num_steps, num_steps, 0)


@cache
def fewest_runs(num_steps: int, slots: int) -> int:
    """Steps to run, from a kept first state, to visit the states num_steps, …, 0 in this order: by trying everything.

    Either no other state is kept on the way to the last one, or the next kept state is `k`; then the states from k on
    are visited with one slot less, and the ones before with all.
    """
    if num_steps == 0:
        return 0
    best = num_steps + fewest_runs(num_steps - 1, slots)
    if slots > 1:
        splits = [k + fewest_runs(num_steps - k, slots - 1) + fewest_runs(k - 1, slots) for k in range(1, num_steps)]
        best = min([best, *splits])
    return best


@pytest.mark.parametrize("slots", range(1, 9))
def test_cost_is_the_least_possible(slots):
    for num_steps in range(1, 41):
        cost = mg.Binomial(slots).cost(num_steps)
        assert cost.forward == cost.reversed == num_steps
        assert cost.forward + cost.replayed == fewest_runs(num_steps, slots)
        assert cost.states == min(slots, num_steps)


@pytest.mark.parametrize("slots", range(1, 9))
def test_cost_is_that_of_revolve(slots):
    for num_steps in range(1, 41):
        # Revolve reverses num_steps + 1 steps, of which the last is our metric, and runs each once more to reverse it.
        length = num_steps + 1
        revolve = Revolve(length, min(slots, num_steps))
        actions = iter(revolve)
        runs = 0
        while not revolve.is_exhausted:
            action = next(actions)
            runs += action.n1 - action.n0 if isinstance(action, Forward) else 0
        cost = mg.Binomial(slots).cost(num_steps)
        assert cost.forward + cost.replayed == runs - length


def test_a_thousand_steps_in_ten_slots():
    # 2.6 replays a step, as the docstring says.
    assert round(mg.Binomial(10).cost(1000).replayed / 1000, 1) == 2.6
