"""Every plan of every schedule obeys the law of reversal, from its start and from wherever a run was cut off."""

from math import ceil, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad as mg
from metagrad._hierarchy import cheapest
from metagrad._plan import Drop, Load, Plan, Reverse, Run, Save

SCHEDULES = st.one_of(
    st.builds(mg.Binomial, st.integers(1, 12)),
    st.just(mg.EveryStep()),
    st.builds(mg.Tree, st.integers(2, 9)),
    st.builds(
        mg.Hierarchical,
        st.integers(0, 6),
        st.integers(1, 6),
        st.sampled_from([0.0, 0.3, 2.0, 50.0]),
        st.sampled_from([0.0, 0.7, 30.0]),
    ),
)


def walk(plan: Plan, num_steps: int, kept: set[int], reversed_to: int | None) -> tuple[int, int, int]:
    """The most states a plan keeps in RAM, on disk, and together, where the `kept` ones are on disk."""
    on_disk, in_ram, hand = set(kept), set(), 0
    awaited = num_steps - 1 if reversed_to is None else reversed_to - 1
    metric_known = reversed_to is not None
    most = (0, len(on_disk), len(on_disk))
    for action in [*plan.forward, None, *plan.reverse]:
        match action:
            case None:
                assert metric_known or hand == num_steps, "the metric needs the last state"
                metric_known = True
            case Save(step, wants_disk):
                assert step == hand and step not in on_disk | in_ram
                (on_disk if wants_disk else in_ram).add(step)
                now = (len(in_ram), len(on_disk), len(in_ram) + len(on_disk))
                most = tuple(map(max, most, now))
            case Load(step):
                assert step in on_disk | in_ram
                hand = step
            case Run(start, stop):
                assert start == hand < stop <= num_steps
                hand = stop
            case Reverse(step):
                assert metric_known and step == hand == awaited
                awaited -= 1
            case Drop(step):
                (on_disk if step in on_disk else in_ram).remove(step)
    assert awaited == -1 and not on_disk | in_ram
    return most


def check_limits(schedule: mg.Schedule, num_steps: int, most: tuple[int, int, int], left: int) -> None:
    """No more states than the schedule was given, unless more are left from before."""
    in_ram, on_disk, together = most
    if isinstance(schedule, mg.Binomial):
        assert together <= max(schedule.slots, left)
    if isinstance(schedule, mg.Hierarchical):
        assert in_ram <= schedule.ram_slots and on_disk <= max(schedule.disk_slots, left)
    if isinstance(schedule, mg.Tree):
        depth = ceil(log(num_steps + 1, schedule.arity) - 1e-9)
        assert in_ram <= (schedule.arity - 1) * depth + 1


@settings(max_examples=400)
@given(schedule=SCHEDULES, num_steps=st.integers(1, 150))
def test_a_plan_reverses_each_step_once_within_its_slots(schedule, num_steps):
    plan = schedule.plan(num_steps)
    most = walk(plan, num_steps, set(), None)
    check_limits(schedule, num_steps, most, 0)
    assert most[1:] == (plan.cost.on_disk, plan.cost.states)
    assert plan.cost.forward == plan.cost.reversed == num_steps


@settings(max_examples=400)
@given(schedule=SCHEDULES, num_steps=st.integers(1, 80), data=st.data())
def test_the_rest_of_a_plan_too_from_any_states(schedule, num_steps, data):
    left = sorted({0, *data.draw(st.sets(st.integers(0, num_steps - 1), max_size=20))})
    reversed_to = data.draw(st.none() | st.integers(0, num_steps))
    kept = schedule.thinned(left, num_steps + 1 if reversed_to is None else reversed_to)
    assert set(kept) <= set(left)
    assert reversed_to is not None or (kept[0] == 0 and kept[-1] == left[-1])
    plan = schedule.rest(num_steps, kept, reversed_to)
    most = walk(plan, num_steps, set(kept), reversed_to)
    if not isinstance(schedule, mg.Tree):  # It promises no number of states, and takes what is left besides.
        check_limits(schedule, num_steps, most, min(len(kept), 2))
    if reversed_to is None:
        # What was done is not done again.
        assert plan.cost.forward == num_steps - left[-1] and plan.cost.reversed == num_steps
    else:
        assert plan.cost.forward == 0 and plan.cost.reversed == reversed_to


@given(num_steps=st.integers(1, 60), data=st.data())
def test_the_rest_after_a_kill_costs_no_more_than_all(num_steps, data):
    schedule = data.draw(SCHEDULES)
    plan = schedule.plan(num_steps)
    cut = data.draw(st.integers(0, len(plan.forward)))
    kept = sorted(action.step for action in plan.forward[:cut] if isinstance(action, Save))
    rest = schedule.rest(num_steps, kept or [0], None).cost
    assert rest.forward + rest.replayed <= plan.cost.forward + plan.cost.replayed


@given(slots=st.integers(2, 9), num_steps=st.integers(1, 80), data=st.data())
def test_thinning_makes_the_rest_no_dearer(slots, num_steps, data):
    left = sorted({0, *data.draw(st.sets(st.integers(0, num_steps - 1), max_size=slots - 1))})
    for schedule in (mg.Binomial(slots), mg.Hierarchical(2, slots)):
        kept = schedule.thinned(left, num_steps + 1)
        costs = [schedule.rest(num_steps, states, None).cost for states in (kept, left)]
        assert costs[0].forward + costs[0].replayed <= costs[1].forward + costs[1].replayed


def test_early_states_do_not_take_the_slots_of_the_rest():
    # With the states 0 … 7 and eight slots, nothing would be left for the 993 steps after them but running each again.
    left, schedule = list(range(8)), mg.Binomial(8)
    kept = schedule.thinned(left, 1001)
    assert schedule.rest(1000, left, None).cost.replayed > 400_000
    assert schedule.rest(1000, kept, None).cost.replayed < 1.5 * schedule.cost(1000).replayed


def test_thinned_states_written_by_hand():
    # The bookmark of a run with one slot is its only progress.
    assert mg.Binomial(1).thinned([0, 40, 100], 201) == [0, 100]
    assert mg.Hierarchical(7, 2).thinned([0, 40, 100], 201) == [0, 100]
    assert mg.EveryStep().thinned([0, 40, 100], 201) == [0, 40, 100]
    # States that were reversed already are of no use; all is done before step 0.
    assert mg.Binomial(3).thinned([0, 40, 100], 41) == [0, 40]
    assert mg.Binomial(3).thinned([0, 40, 100], 0) == []


def test_a_tree_written_by_hand():
    # Four steps and the metric are five: halves 0 1 | 2 3 4, then 2 | 3 4. State 4 is in hand, and so is 3.
    assert mg.Tree(2).plan(4) == Plan(
        forward=[Save(0), Run(0, 2), Save(2), Run(2, 3), Save(3), Run(3, 4)],
        reverse=[
            *[Load(3), Reverse(3), Drop(3)],
            *[Load(2), Reverse(2), Drop(2)],
            *[Load(0), Run(0, 1), Reverse(1), Load(0), Reverse(0), Drop(0)],
        ],
    )
    assert mg.Tree(2).cost(4) == (4, 1, 4, 3, 0)


@pytest.mark.parametrize(
    "arity, replays, states",
    # Replays a step and states of a balanced tree at T = 1000 that runs from step 0 without keeping states on the way.
    [(2, 5.05, 10), (8, 3.14, 22), (32, 1.94, 62), (100, 1.89, 109)],
)
def test_a_tree_of_a_thousand_steps_is_no_worse_than_known_ones(arity, replays, states):
    cost = mg.Tree(arity).cost(1000)
    assert cost.replayed / 1000 <= replays and cost.states <= states


@given(arity=st.integers(2, 12), num_steps=st.integers(1, 300))
def test_binomial_is_never_worse_than_a_tree(arity, num_steps):
    tree = mg.Tree(arity).cost(num_steps)
    assert mg.Binomial(tree.states).cost(num_steps).replayed <= tree.replayed


def seconds(schedule: mg.Hierarchical, num_steps: int, write: float, read: float) -> float:
    """The time of a plan in its own model: replays, and every copy to and from the disk."""
    plan = schedule.plan(num_steps)
    actions = [*plan.forward, *plan.reverse]
    files = {action.step for action in actions if isinstance(action, Save) and action.on_disk}
    num_writes = sum(isinstance(action, Save) and action.on_disk for action in actions)
    num_reads = sum(isinstance(action, Load) and action.step in files for action in actions)
    return plan.cost.replayed + write * num_writes + read * num_reads


@settings(max_examples=300)
@given(
    num_steps=st.integers(1, 200),
    ram=st.integers(0, 8),
    disk=st.integers(1, 8),
    write=st.sampled_from([0.0, 0.2, 1.0, 5.0, 40.0]),
    read=st.sampled_from([0.0, 0.2, 1.0, 5.0]),
)
def test_a_hierarchy_costs_no_more_than_ram_alone(num_steps, ram, disk, write, read):
    both = mg.Hierarchical(ram, disk, write, read)
    # One state on disk is the initial one: all others are in RAM.
    assert seconds(both, num_steps, write, read) <= seconds(
        mg.Hierarchical(ram, 1, write, read), num_steps, write, read
    )


@pytest.mark.parametrize(
    "num_steps, ram, disk, write, read", [(200, 3, 5, 0.5, 0.5), (400, 10, 10, 2.0, 1.0), (97, 0, 4, 3.0, 0.0)]
)
def test_the_time_foreseen_is_that_of_the_plan(num_steps, ram, disk, write, read):
    # Of the metric and all steps, the initial state written besides.
    foreseen = write + cheapest(num_steps + 1, disk - 1, ram + 1, write, read)[0] - num_steps
    assert seconds(mg.Hierarchical(ram, disk, write, read), num_steps, write, read) == pytest.approx(foreseen)


@settings(max_examples=300)
@given(num_steps=st.integers(1, 200), ram=st.integers(0, 8), disk=st.integers(1, 8))
def test_free_copies_make_a_hierarchy_binomial(num_steps, ram, disk):
    assert mg.Hierarchical(ram, disk).cost(num_steps).replayed == mg.Binomial(ram + disk).cost(num_steps).replayed
