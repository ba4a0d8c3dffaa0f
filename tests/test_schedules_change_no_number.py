"""Contract 2: the schedule changes cost, never numbers; contract 3: memory is what the schedule was given."""

import optree
import pytest
from agreement import assert_agree, assert_same_bits
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from optimizers import ALL_OPTIMIZERS, OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS, STEP

import metagrad as mg

ALL_PROBLEMS = {**PROBLEMS, **ODD_PROBLEMS}
PROBLEM = PROBLEMS["mlp"](5)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("name", ALL_PROBLEMS)
def test_every_schedule_gives_the_same_bits(name, num_steps):
    arguments = ALL_PROBLEMS[name](num_steps).arguments(OPTIMIZERS["adamw"], clip_norm=0.1)
    wanted = mg.metagradient(*arguments, schedule=mg.EveryStep(), wrt_params=True)
    for slots in (1, 2, 3, 4):
        assert_same_bits(mg.metagradient(*arguments, schedule=mg.Binomial(slots), wrt_params=True), wanted)


@pytest.mark.skipif(bool(STEP), reason="such steps keep no graph")
@pytest.mark.parametrize("name", ALL_PROBLEMS)
def test_kept_graphs_change_no_number_but_by_rounding(name):
    arguments = ALL_PROBLEMS[name](5).arguments(OPTIMIZERS["adamw"], clip_norm=0.1)
    wanted = mg.metagradient(*arguments, schedule=mg.EveryStep(), wrt_params=True)
    for num_graphs in (2, 5, 9):
        found = mg.metagradient(*arguments, schedule=mg.EveryStep(num_graphs), wrt_params=True)
        assert_agree(found, wanted, rtol=1e-11)
        assert found.stats[:3] == wanted.stats[:3]


def test_a_kept_graph_is_not_made_again():
    """Each batch of a step that keeps its graph is used for one gradient: one call of the loss."""
    calls = []

    def loss(params, batch, meta):
        calls.append(batch["number"])
        return PROBLEM.loss(params, batch["own"])

    for num_graphs, expected in [(1, [2, 2, 2, 2, 1]), (3, [2, 2, 1, 1, 1])]:
        calls.clear()
        batches = [{"number": t, "own": batch} for t, batch in enumerate(PROBLEM.batches)]
        step = mg.TrainStep(loss, OPTIMIZERS["adam"])
        given = PROBLEM.metric, step, PROBLEM.params, batches, {}
        mg.metagradient(*given, schedule=mg.EveryStep(num_graphs), wrt_params=True)
        assert [calls.count(t) for t in range(5)] == expected


@pytest.mark.skipif(bool(STEP), reason="options of its own")
def test_graphs_are_refused_where_there_are_none(tmp_path):
    for options in ({"microbatch_size": 2}, {"curvature": "forward-over-reverse"}, {"compile": True}):
        with pytest.raises(ValueError, match="keeps no graph"):
            mg.metagradient(*PROBLEM.arguments(OPTIMIZERS["sgd"], **options), schedule=mg.EveryStep(num_graphs=2))
    with pytest.raises(ValueError, match="do not outlive a process"):
        arguments = PROBLEM.arguments(OPTIMIZERS["sgd"])
        mg.metagradient(*arguments, schedule=mg.EveryStep(num_graphs=2), resume=tmp_path / "run")


def test_no_number_of_graphs_below_one():
    with pytest.raises(ValueError, match="`num_graphs` is 0"):
        mg.EveryStep(num_graphs=0)


@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(
    name=st.sampled_from(sorted(PROBLEMS)),
    optimizer=st.sampled_from(sorted(ALL_OPTIMIZERS)),
    num_steps=st.sampled_from([2, 5, 13]),
    slots=st.integers(1, 4),
    microbatch_size=st.sampled_from([None, 2]),
    wrt_params=st.booleans(),
)
def test_same_bits_for_any_combination(name, optimizer, num_steps, slots, microbatch_size, wrt_params):
    arguments = PROBLEMS[name](num_steps).arguments(ALL_OPTIMIZERS[optimizer], microbatch_size=microbatch_size)
    wanted = mg.metagradient(*arguments, schedule=mg.EveryStep(), wrt_params=wrt_params)
    assert_same_bits(mg.metagradient(*arguments, schedule=mg.Binomial(slots), wrt_params=wrt_params), wanted)


@pytest.mark.parametrize("num_steps, slots", [(1, 1), (5, 2), (13, 3), (13, 20)])
def test_the_plan_is_what_is_run(num_steps, slots):
    schedule = mg.Binomial(slots)
    stats = mg.metagradient(*PROBLEMS["mlp"](num_steps).arguments(OPTIMIZERS["sgd"]), schedule=schedule).stats
    assert (stats.forward, stats.replayed, stats.reversed) == schedule.cost(num_steps)[:3]


def num_bytes(state: mg.State) -> int:
    return sum(leaf.nbytes for leaf in optree.tree_leaves(state) if hasattr(leaf, "nbytes"))


def test_kept_states_do_not_grow_with_the_number_of_steps():
    kept = []
    for num_steps in (5, 20, 80):
        result = mg.metagradient(*PROBLEMS["mlp"](num_steps).arguments(OPTIMIZERS["adam"]), schedule=mg.Binomial(3))
        kept.append(result.stats.ram_bytes)
    assert kept[0] == kept[1] == kept[2] <= 3 * num_bytes(result.state)
    assert result.stats.disk_bytes == 0


def test_all_kept_states_are_counted():
    result = mg.metagradient(*PROBLEMS["mlp"](6).arguments(OPTIMIZERS["adam"]), schedule=mg.EveryStep())
    assert result.stats.ram_bytes == 6 * num_bytes(result.state)


def test_a_store_is_left_empty_and_can_be_used_again():
    store, arguments = mg.RamStore(), PROBLEMS["mlp"](5).arguments(OPTIMIZERS["adam"])
    first = mg.metagradient(*arguments, schedule=mg.Binomial(2), store=store)
    for step in range(6):
        with pytest.raises(KeyError):
            store.get(step)
    assert_same_bits(mg.metagradient(*arguments, schedule=mg.Binomial(3), store=store), first)


def test_no_state_keeps_a_graph():
    class Recorder(mg.Store):
        def __init__(self) -> None:
            self.ram, self.seen = mg.RamStore(), []

        def put(self, state: mg.State) -> None:
            self.seen.extend(optree.tree_leaves(state))
            self.ram.put(state)

        def get(self, step: int) -> mg.State:
            return self.ram.get(step)

        def drop(self, step: int) -> None:
            self.ram.drop(step)

        @property
        def peak_bytes(self) -> tuple[int, int]:
            return self.ram.peak_bytes

    store = Recorder()
    result = mg.metagradient(*PROBLEMS["cnn"](4).arguments(OPTIMIZERS["adam"]), store=store)
    tensors = [leaf for leaf in [*store.seen, *optree.tree_leaves(result.state)] if hasattr(leaf, "requires_grad")]
    assert len(tensors) > 20
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_progress_bar_changes_no_number(capsys):
    arguments = PROBLEMS["mlp"](5).arguments(OPTIMIZERS["adam"])
    shown = mg.metagradient(*arguments, schedule=mg.Binomial(2), progress=True)
    bars = capsys.readouterr().err
    # 5 steps forward; then 3 runs again and 5 reversals.
    assert "train" in bars and "5/5" in bars and "replay" in bars and "8/8" in bars
    assert_same_bits(shown, mg.metagradient(*arguments, schedule=mg.Binomial(2)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_kept_gradient_is_not_computed_again(num_steps):
    """With micro-batches the gradient is needed whole before it can be pulled back, and is kept with its state."""
    problem, calls = PROBLEMS["mlp"](num_steps), []

    def loss(params, batch):
        calls.append(1)
        return problem.loss(params, batch)

    step = mg.TrainStep(mg.weighted(loss), OPTIMIZERS["adam"], microbatch_size=2)  # two pieces of a batch
    arguments = problem.metric, step, problem.params, problem.batches, problem.meta
    kept = mg.metagradient(*arguments, schedule=mg.EveryStep(), wrt_params=True)
    assert len(calls) == 2 * 2 * num_steps  # once for the gradient, once to pull it back
    again = mg.metagradient(*arguments, schedule=mg.Binomial(1), wrt_params=True)
    assert_same_bits(kept, again)
