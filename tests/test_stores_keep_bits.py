"""Every store gives back what it was given, bit for bit; so no schedule, store or folder changes a number."""

from math import pi
from pathlib import Path
from tempfile import TemporaryDirectory

import optree
import pytest
import torch
from durable import NUM_EXAMPLES, Setup, call, same, tensors
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import metagrad as mg
from metagrad._files import Blueprint, read_tree, write_tree
from metagrad._store import Kept, TieredStore

NUM_STEPS = 11
CONTIGUOUS = torch.contiguous_format

RAM_SCHEDULES = st.one_of(
    st.builds(mg.Binomial, st.integers(1, 12)), st.just(mg.EveryStep()), st.builds(mg.Tree, st.integers(2, 4))
)
DISK_SCHEDULES = st.builds(mg.Hierarchical, st.integers(0, 3), st.integers(1, 4), st.sampled_from([0.0, 1.5]))


@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(
    schedule=RAM_SCHEDULES | DISK_SCHEDULES,
    place=st.sampled_from(["ram", "disk", "folder"]),
    microbatch_size=st.sampled_from([None, 1, 3]),
    several=st.booleans(),
    wrt_params=st.booleans(),
)
def test_no_schedule_or_store_changes_a_bit(schedule, place, microbatch_size, several, wrt_params):
    setup = Setup(mg.EveryStep(), microbatch_size, several, wrt_params)
    wanted = tensors(call(setup, NUM_STEPS))
    with TemporaryDirectory() as folder:
        if place == "folder":
            options = {"resume": folder}
        elif place == "disk" or isinstance(schedule, mg.Hierarchical):
            options = {"store": mg.DiskStore(folder)}
        else:
            options = {"store": mg.RamStore()}
        result = call(setup._replace(schedule=schedule), NUM_STEPS, **options)
        assert same(tensors(result), wanted)
        left = {path.name.split("-")[0] for path in Path(folder).glob("*.safetensors")}
        assert left == ({"final", "witness", "reverse"} if place == "folder" else set())


def odd_state(step: int) -> mg.State:
    """A state with every kind of leaf that a user's step may carry."""
    base = torch.arange(24.0).reshape(4, 6)
    return mg.State(
        params={
            "transposed": base.T,
            "row": base[2],
            "one": base[:1, 0],
            "other": base[:, ::2],
            "scalar": torch.tensor(pi),
        },
        buffers={"empty": torch.zeros(0, 3), "count": torch.tensor(7), "mask": torch.tensor([True, False])},
        optimizer=[
            torch.tensor([0.0, -0.0, float("inf"), float("nan"), 5e-324]),
            torch.tensor([-1.5, 3e-40]).to(torch.bfloat16),
            torch.tensor([65504.0], dtype=torch.float16),
            (torch.tensor([-128, 127], dtype=torch.int8), 3, 0.1, True, "a word", None),
        ],
        rng=(torch.get_rng_state(),),
        step=step,
    )


def octets(state: mg.State) -> list[object]:
    """What must be equal: the bytes, types and shapes of all tensors, and all numbers."""
    return [
        (leaf.dtype, leaf.shape, bytes(leaf.flatten().clone(memory_format=CONTIGUOUS).view(torch.uint8).tolist()))
        if isinstance(leaf, torch.Tensor)
        else (type(leaf), leaf)
        for leaf in optree.tree_leaves(state)
    ]


@pytest.mark.parametrize("kind", ["ram", "disk", "tiered"])
def test_a_store_gives_back_every_bit(kind, tmp_path):
    fast, slow = mg.RamStore(), mg.DiskStore(tmp_path)
    store = {"ram": fast, "disk": slow, "tiered": TieredStore(fast, slow, {1, 3})}[kind]
    extra = {"gradient": torch.randn(5), "shared": (shared := torch.randn(3), shared[1:])}
    for step in range(5):
        store.put(Kept(odd_state(step), extra if step % 2 else None))
    for step in (4, 0, 3, 1, 2, 2):
        store.expect(step)
        state, kept_with_it = store.get(step)
        assert octets(state) == octets(odd_state(step))
        assert octets(kept_with_it) == octets(extra if step % 2 else None)
    for step in range(5):
        store.drop(step)
        with pytest.raises(KeyError):
            store.get(step)
    store.close()
    assert not any(tmp_path.iterdir())


def test_a_file_keeps_every_bit_for_a_process_that_has_only_the_blueprint(tmp_path):
    path = write_tree(tmp_path, "state", odd_state(41))
    assert octets(read_tree(path, Blueprint.of(odd_state(0)))) == octets(odd_state(41))


def test_what_is_read_is_aligned_and_belongs_to_no_file(tmp_path):
    state = read_tree(write_tree(tmp_path, "state", odd_state(1)), Blueprint.of(odd_state(1)))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.params.values())
    before = octets(state)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert octets(state) == before


def test_another_kind_of_state_is_refused(tmp_path):
    path = write_tree(tmp_path, "state", odd_state(1))
    other = odd_state(1)._replace(buffers={"empty": torch.zeros(0, 3, dtype=torch.float32)})
    with pytest.raises(mg.ResumeError, match="state.*where a float32 tensor of shape \\(0, 3\\) was expected"):
        read_tree(path, Blueprint.of(other))


def test_batches_need_no_tensors_of_their_own(tmp_path):
    # Views of one table, as most loaders give them: nothing is written of them, and nothing aliased.
    table = torch.linspace(-1, 1, NUM_EXAMPLES * 3).reshape(NUM_EXAMPLES, 3)
    batches = [{"index": torch.arange(2, 6), "x": table[2:], "y": table[2:, 0]}] * NUM_STEPS
    setup = Setup(mg.Binomial(2), 2)
    wanted = tensors(call(setup, NUM_STEPS, batches=batches))
    assert same(tensors(call(setup, NUM_STEPS, batches=batches, resume=tmp_path)), wanted)
