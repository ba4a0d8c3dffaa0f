"""A step that does not repeat itself is found and named, whatever the schedule; and the digests that find it."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
import torchopt
from durable import NUM_EXAMPLES, Setup, call, loss
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import metagrad as mg
from metagrad._plan import Run
from metagrad._transformation import Transformation
from metagrad._witness import digests

NUM_STEPS = 13
SCHEDULES = [mg.Binomial(1), mg.Binomial(3), mg.Tree(2), mg.Tree(3), mg.Hierarchical(1, 2), mg.Hierarchical(0, 3)]


def first_run_again(schedule: mg.Schedule, awaited: int | None = None) -> int:
    """The first step that the reverse plan runs, or the first of its runs that takes the step `awaited`."""
    starts = [a.start for a in schedule.plan(NUM_STEPS).reverse if isinstance(a, Run)]
    return starts[0] if awaited is None else next(start for start in starts if start == awaited)


def counting():
    calls = Counter()

    def remembering(params, batch):
        calls["loss"] += 1
        return loss(params, batch) * (1 + 1e-6 * calls["loss"])

    return {"loss": remembering}


def drawing_from_python():
    return {"loss": lambda params, batch: loss(params, batch) + random.random() * params["a"].sum()}


def drawing_from_numpy():
    generator = np.random.default_rng(0)
    return {"loss": lambda params, batch: loss(params, batch) * generator.uniform(0.9, 1.1)}


class Changing(list):
    """Batches whose third reading is another: after one before training and one in it, that of the replay."""

    def __init__(self, batches):
        super().__init__(batches)
        self.readings = Counter()

    def __getitem__(self, step):
        self.readings[step] += 1
        batch = super().__getitem__(step)
        return {**batch, "y": batch["y"] + 1e-12 * (self.readings[step] > 2)}


def changing_batches():
    x, y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(0, 1, 4)
    return {"batches": Changing([{"index": torch.arange(4) % NUM_EXAMPLES, "x": x, "y": y}] * NUM_STEPS)}


STEPS = [counting, drawing_from_python, drawing_from_numpy]


@pytest.mark.parametrize("make", STEPS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_step_that_does_not_repeat_itself_is_named(schedule, make, tmp_path):
    options = make()
    message = rf"step {first_run_again(schedule)} was run again and gave another state.params\['a'\]"
    store = mg.DiskStore(tmp_path) if isinstance(schedule, mg.Hierarchical) else None
    with pytest.raises(mg.ReplayMismatchError, match=message):
        call(Setup(schedule), NUM_STEPS, **options, store=store)


@pytest.mark.parametrize("schedule", [mg.EveryStep(), *SCHEDULES], ids=repr)
def test_a_batch_that_is_another_when_read_again_is_named(schedule, tmp_path):
    store = mg.DiskStore(tmp_path) if isinstance(schedule, mg.Hierarchical) else None
    # With every state kept, the last step goes forward and back at one reading of its batch.
    step = NUM_STEPS - 2 if isinstance(schedule, mg.EveryStep) else first_run_again(schedule)
    with pytest.raises(mg.ReplayMismatchError, match=f"the batch of step {step} is another than when it was read"):
        call(Setup(schedule), NUM_STEPS, **changing_batches(), store=store)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_momentum_that_remembers_its_first_call_is_named(schedule, tmp_path):
    # Declared to be pure, which it is not: otherwise it would be refused before the run.
    momentum = torchopt.sgd(0.05, momentum=0.9, dampening=0.5)
    step = mg.TrainStep(mg.weighted(loss), Transformation(momentum.init, momentum.update))
    store = mg.DiskStore(tmp_path) if isinstance(schedule, mg.Hierarchical) else None
    message = rf"step {first_run_again(schedule, awaited=0)} was run again and gave another state.params\['a'\], "
    with pytest.raises(mg.ReplayMismatchError, match=message):
        call(Setup(schedule), NUM_STEPS, step=step, store=store)


@pytest.mark.parametrize("schedule", [mg.Binomial(3), mg.Hierarchical(1, 2)], ids=repr)
def test_a_run_in_a_folder_is_proved_too(schedule, tmp_path):
    with pytest.raises(mg.ReplayMismatchError, match=f"step {first_run_again(schedule)} was run again"):
        call(Setup(schedule), NUM_STEPS, **counting(), resume=tmp_path)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
]  # fmt: skip
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@st.composite
def tensors(draw, least: int = 0) -> Tensor:
    """A tensor of any bits, small and large enough for every part of a digest."""
    dtype = draw(st.sampled_from(DTYPES))
    count = draw(st.integers(least, 40) | st.integers(least, 3000))
    octets = draw(st.randoms(use_true_random=False)).randbytes(max(count * dtype.itemsize, 1))
    return torch.frombuffer(bytearray(octets), dtype=torch.uint8)[: count * dtype.itemsize].clone().view(dtype)


def differ(left: Tensor, right: Tensor) -> bool:
    return not torch.equal(digests([left]), digests([right]))


@given(tensor=tensors(least=1), data=st.data())
def test_one_changed_bit_is_seen(tensor, data):
    changed = tensor.clone()
    octets = changed.view(torch.uint8)
    place, bit = data.draw(st.integers(0, len(octets) - 1)), data.draw(st.integers(0, 7))
    octets[place] ^= 1 << bit
    assert differ(tensor, changed)


@given(tensor=tensors(least=2), data=st.data())
def test_two_elements_that_change_places_are_seen(tensor, data):
    places = st.integers(0, len(tensor) - 1)
    left, right = data.draw(places), data.draw(places)
    changed = tensor.clone()
    changed[left], changed[right] = tensor[right], tensor[left]
    assume(bool((changed.view(torch.uint8) != tensor.view(torch.uint8)).any()))
    assert differ(tensor, changed)


@given(tensor=tensors(least=2), size=st.integers(1, 3), data=st.data())
def test_changes_that_cancel_are_seen(tensor, size, data):
    assume(not tensor.is_complex())
    left, right = data.draw(st.lists(st.integers(0, len(tensor) - 1), min_size=2, max_size=2, unique=True))
    changed = tensor.clone()
    bits = changed.view(BITS[tensor.element_size()])
    bits[left] += size
    bits[right] -= size
    assert differ(tensor, changed)


def test_zeros_of_another_sign_and_rows_that_change_places_are_seen():
    zeros = torch.zeros(50)
    assert differ(zeros, -zeros)
    left, right = zeros.clone(), zeros.clone()
    left[3], right[17] = -0.0, -0.0
    assert differ(left, right)
    table = torch.arange(64.0).reshape(8, 8)
    assert differ(table, table.flip(0)) and differ(table, table.flip(1)) and differ(table, table.T)


@given(tensor=tensors(), offset=st.integers(0, 9), stride=st.integers(1, 3))
def test_equal_tensors_have_equal_digests_wherever_they_lie(tensor, offset, stride):
    spread = torch.zeros(offset + stride * len(tensor), dtype=tensor.dtype)
    view = spread[offset::stride][: len(tensor)]
    view.copy_(tensor)
    assert not differ(tensor, view)


def test_equal_tensors_of_any_shape_and_layout():
    table = torch.randn(6, 4, 2)
    assert not differ(table, table.mT.contiguous().mT)
    assert not differ(table.transpose(0, 2), table.transpose(0, 2).contiguous())
    assert not differ(torch.ones(1).expand(9), torch.ones(9))
    assert not differ(torch.tensor(True), torch.tensor(True)) and differ(torch.tensor(True), torch.tensor(False))
    complex_ = torch.randn(5, dtype=torch.complex128)
    assert not differ(complex_.conj(), complex_.conj().resolve_conj()) and differ(complex_, complex_.conj())
    assert digests({}).shape == (0, 2) and digests([table, table[0, 0, 0], torch.zeros(0)]).shape == (3, 2)
