"""Samples find their batch, whatever order they come in; batches are given up and forgotten in time. No clock runs."""

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpg.serve
from dpg.serve.barrier import Barrier, Order
from dpg.serve.batch import Failure, Key, Refused, Rewards, Sample, Shape, UnevenGroups
from dpg.serve.limits import Limits

RICH = Rewards({}, {}, 1.0, 1.0, 0.5, {})


def order(
    name: str, *ids: str, size: int = 4, group_size: int | None = 2, stream: bool = False, text: str = ""
) -> Order:
    """Samples whose first letter is their group."""
    samples = {id: Sample(id, id[0], f"text of {id}{text}") for id in ids}
    return Order(name, stream, Shape(size, group_size), samples)


def sent(barrier: Barrier, name: str, *ids: str, now: float = 0.0, **options: object) -> list[Key]:
    """The batches that samples went into, sent one by one."""
    return [barrier.submit(order(name, id, **options), now) for id in ids]


IDS = ["a1", "a2", "b1", "b2"]


@settings(max_examples=60)
@given(st.permutations([*IDS, *IDS]))
def test_any_order_with_repetitions_gives_one_batch_in_one_order(arrivals):
    barrier = Barrier(Limits())
    sent(barrier, "x", *arrivals)
    batch = barrier.next_whole()
    assert [sample.id for sample in batch.ordered()] == IDS and batch.group_size() == 2
    assert barrier.next_whole() is None


@settings(max_examples=60)
@given(st.permutations(range(12)), st.lists(st.integers(0, 11), max_size=12))
def test_a_stream_is_cut_into_whole_batches_and_no_sample_is_in_two(arrivals, again):
    barrier, names = Barrier(Limits()), [f"a{i}" for i in arrivals]
    keys = {}
    for place, name in enumerate(names):
        keys[name] = barrier.submit(order("s", name, group_size=None, stream=True), 0.0)
        assert keys[name] == Key("s", place // 4)
        for i in again:  # Whatever was sent already goes where it was.
            if f"a{i}" in keys:
                assert barrier.submit(order("s", f"a{i}", group_size=None, stream=True), 0.0) == keys[f"a{i}"]
    batches = [barrier.next_whole() for _ in range(3)]
    assert sorted(id for batch in batches for id in batch.samples) == sorted(names)


def test_a_stream_remembers_samples_of_finished_batches():
    barrier = Barrier(Limits())
    (first, *_) = sent(barrier, "s", *IDS, stream=True)
    barrier.finish(barrier.next_whole(), RICH, 1.0)
    assert sent(barrier, "s", "a1", stream=True) == [first] == [Key("s", 0)]
    assert sent(barrier, "s", "a9", stream=True) == [Key("s", 1)]
    with pytest.raises(Refused, match="a sample 'a1' already, with another text or group") as refused:
        sent(barrier, "s", "a1", stream=True, text="!")
    assert refused.value.kind == "conflict"


def test_streams_and_batches_of_one_name_are_apart():
    barrier = Barrier(Limits())
    assert sent(barrier, "x", "a1", stream=True) + sent(barrier, "x", "a1") == [Key("x", 0), Key("x")]
    assert len(barrier.open) == 2


def test_batches_wait_in_line_in_the_order_in_which_they_were_whole():
    barrier = Barrier(Limits())
    sent(barrier, "x", *IDS[:3])
    sent(barrier, "y", *IDS)
    sent(barrier, "x", IDS[3])
    assert barrier.line == [Key("y"), Key("x")]
    assert [barrier.next_whole().key for _ in range(2)] == [Key("y"), Key("x")]
    assert len(barrier.open) == 2  # Both are being computed, as far as it knows.


def test_a_refused_request_changes_nothing():
    barrier = Barrier(Limits())
    sent(barrier, "x", "a1", "a2", "b1")
    for wrong in (order("x", "b2", "b3"), order("x", "b2", size=6), order("x", "b2", "a1", text="!")):
        with pytest.raises(Refused):
            barrier.submit(wrong, 0.0)
    assert list(barrier.open[0].samples) == ["a1", "a2", "b1"]


def test_a_batch_that_stays_incomplete_is_given_up_on_time():
    barrier = Barrier(Limits(fill_seconds=600))
    sent(barrier, "x", "a1", "a2", "b1", now=10.0)
    assert barrier.expire(610.0) == []
    (done,) = barrier.expire(610.1)
    assert done.outcome.kind == "incomplete"
    assert "batch x was given up after 600 s: 3 of 4 samples; of groups of 2, 'b' has 1." in done.outcome.message
    assert barrier.outcome(Key("x")) == done and barrier.open == []
    sent(barrier, "x", "a1", now=611.0)  # Who was in it may ask again;
    with pytest.raises(Refused, match="batch x is over .*3 of 4 samples.* not in it: 'b2'") as refused:
        sent(barrier, "x", "b2", now=611.0)  # who comes too late may not.
    assert refused.value.kind == "over"


def test_whole_groups_may_be_missing():
    barrier = Barrier(Limits(fill_seconds=1))
    sent(barrier, "x", "a1", "a2")
    assert "2 of 4 samples, in 1 whole groups of 2." in barrier.expire(2.0)[0].outcome.message


def test_a_batch_that_waits_or_computes_too_long_is_given_up():
    barrier = Barrier(Limits(fill_seconds=5, compute_seconds=100))
    sent(barrier, "x", *IDS, now=0.0)
    sent(barrier, "y", *IDS, now=50.0)
    computing = barrier.next_whole()
    assert computing.key == Key("x") and barrier.expire(100.0) == []
    (late,) = barrier.expire(101.0)
    assert (late.key, late.outcome.kind) == (Key("x"), "overdue") and "in line" not in late.outcome.message
    assert barrier.finish(computing, RICH, 102.0) is None and barrier.outcome(Key("x")) == late  # It was told already.
    (late,) = barrier.expire(151.0)
    assert late.key == Key("y") and "for 100 s in line behind others without rewards" in late.outcome.message
    assert barrier.line == [] and barrier.next_whole() is None


def test_results_are_kept_for_a_time_and_a_number():
    barrier = Barrier(Limits(kept_batches=2, kept_seconds=60))
    for place, name in enumerate("xyz"):
        sent(barrier, name, *IDS)
        barrier.finish(barrier.next_whole(), RICH, 10.0 * place)
    barrier.expire(30.0)
    assert [barrier.outcome(Key(name)) is None for name in "xyz"] == [True, False, False]
    barrier.expire(75.0)
    assert [barrier.outcome(Key(name)) is None for name in "xyz"] == [True, True, False]
    sent(barrier, "x", "a1")  # Forgotten: it opens a batch of that name anew.
    assert barrier.open[0].key == Key("x")


def test_batches_may_not_be_too_many():
    barrier = Barrier(Limits(open_batches=2))
    sent(barrier, "x", "a1")
    sent(barrier, "y", *IDS)
    batch = barrier.next_whole()
    with pytest.raises(Refused, match="2 batches are open") as refused:
        sent(barrier, "z", "a1")
    assert refused.value.kind == "busy"
    barrier.finish(batch, Failure("failed", "it did"), 1.0)
    sent(barrier, "z", "a1")


def test_rewards_that_come_too_late_go_to_no_other_batch_of_the_name():
    barrier = Barrier(Limits(compute_seconds=1, kept_seconds=1))
    sent(barrier, "x", *IDS)
    old = barrier.next_whole()
    barrier.expire(2.0)
    barrier.expire(4.0)  # Given up, and forgotten.
    sent(barrier, "x", *IDS, now=4.0, text="!")
    assert barrier.finish(old, RICH, 4.5) is None and barrier.outcome(Key("x")) is None
    assert barrier.finish(barrier.next_whole(), RICH, 4.6).outcome == RICH


def test_a_finished_batch_has_the_size_that_it_had():
    barrier = Barrier(Limits())
    sent(barrier, "x", *IDS)
    barrier.finish(barrier.next_whole(), RICH, 1.0)
    with pytest.raises(Refused, match="batch x had .*, but this request says") as refused:
        sent(barrier, "x", *IDS, now=2.0, size=len(IDS) + 2)
    assert refused.value.kind == "conflict"


def test_closing_gives_up_every_open_batch():
    barrier = Barrier(Limits())
    sent(barrier, "x", "a1")
    sent(barrier, "y", *IDS)
    assert [done.key for done in barrier.close(Failure("stopping", "it is"), 1.0)] == [Key("x"), Key("y")]
    assert barrier.open == [] and barrier.line == []


@pytest.mark.parametrize(("group_size", "named"), [(2, "'a' has 3, 'b' has 1"), (None, "'a' has 3")])
def test_groups_that_are_not_filled(group_size, named):
    barrier = Barrier(Limits())
    sent(barrier, "x", "a1", "a2", "a3", "b1", group_size=group_size)
    with pytest.raises(UnevenGroups, match=named):
        barrier.next_whole().group_size()


def test_groups_of_a_size_that_nobody_said():
    barrier = Barrier(Limits())
    sent(barrier, "x", *IDS, group_size=None)
    assert barrier.next_whole().group_size() == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fill_second=3", "expected key=value with a key of body_bytes, text_length"),
        ("fill_seconds", "expected key=value"),
        ("batch_size=2.5", "--limit batch_size=2.5: expected a whole number"),
        ("fill_seconds=soon", "--limit fill_seconds=soon: expected a number"),
        ("fill_seconds=0", "the limit fill_seconds is 0.0. Pass a number above 0"),
        ("fill_seconds=nan", "the limit fill_seconds is nan"),
    ],
)
def test_limits_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        Limits().changed([given])


def test_limits_are_changed_by_name():
    assert Limits().changed(["fill_seconds=1.5", "batch_size=8"]) == Limits(fill_seconds=1.5, batch_size=8)


@pytest.mark.parametrize("name", ["limits", "batch", "barrier", "wire"])
def test_the_barrier_knows_no_tensor_no_network_and_no_clock(name):
    tree = ast.parse((Path(dpg.serve.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    modules = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules <= {"collections", "dataclasses", "hashlib", "json", "typing", "dpg"}
