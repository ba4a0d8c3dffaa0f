"""On a GPU: the same gradients, the same bits under every schedule, and memory that is what the schedule was given.

Skipped where torch finds no CUDA device; `nox -s gpu` runs them there.
"""

import os
from dataclasses import replace
from functools import partial

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Read when CUDA starts: torch's deterministic products.

import pytest
import torch
from agreement import assert_agree, assert_same_bits
from optimizers import OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS
from torch import nn

import metagrad as mg

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ALL_PROBLEMS = {**PROBLEMS, **ODD_PROBLEMS}


@pytest.fixture
def on_gpu():
    """Builds problems on the GPU: every tensor that they draw is put there."""

    def built(name, num_steps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "Generator", partial(torch.Generator, "cuda"))
            return ALL_PROBLEMS[name].__wrapped__(num_steps)

    torch.set_default_device("cuda")
    yield built
    torch.set_default_device("cpu")


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"clip_norm": 0.1}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ALL_PROBLEMS)
def test_gradients_are_exact(on_gpu, name, optimizer, options):
    arguments = on_gpu(name, 4).arguments(OPTIMIZERS[optimizer], **options)
    exact = mg.check.unrolled(*arguments, wrt_params=True)
    assert_agree(mg.metagradient(*arguments, wrt_params=True), exact, rtol=1e-9)


@pytest.mark.parametrize("name", ["cnn", "gpt2"])  # with dropout: the device's random numbers are replayed
def test_schedules_and_stores_change_no_bit(on_gpu, name):
    torch.use_deterministic_algorithms(True)
    try:
        arguments = on_gpu(name, 5).arguments(OPTIMIZERS["adamw"])
        wanted = mg.metagradient(*arguments, schedule=mg.EveryStep(), wrt_params=True)
        for slots in (1, 2, 4):
            for store in (mg.RamStore(), mg.PinnedStore()):
                found = mg.metagradient(*arguments, schedule=mg.Binomial(slots), store=store, wrt_params=True)
                assert_same_bits(found, wanted)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, on importing itself
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_a_compiled_run_is_the_uncompiled_one(on_gpu, name):
    problem = on_gpu(name, 3)
    compiled, plain = (
        mg.metagradient(*problem.arguments(OPTIMIZERS["adam"], compile=on), wrt_params=True) for on in (True, False)
    )
    assert_agree(compiled, plain, rtol=1e-10)


def large(num_steps):
    """A perceptron of 8 million parameters, in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 2000), nn.Tanh(), nn.Linear(2000, 2000)).float().cuda()

    def loss(params, batch):
        return torch.func.functional_call(model, params, (batch["x"],)).square().mean(1)

    batch = {"x": torch.randn(64, 2000, dtype=torch.float32, device="cuda"), "index": torch.arange(64, device="cuda")}
    step = mg.TrainStep(mg.weighted(loss), mg.optim.adam(1e-3))
    meta = {"weights": torch.ones(64, dtype=torch.float32, device="cuda")}
    return lambda state: loss(state.params, batch).mean(), step, model, [batch] * num_steps, meta


def peak(num_steps, **options):
    """Bytes of the device's memory above what was there before, at most."""
    arguments = large(num_steps)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mg.metagradient(*arguments, **options)
    return torch.cuda.max_memory_allocated() - before


def test_memory_does_not_grow_with_the_number_of_steps():
    few, many = (peak(num_steps, schedule=mg.Binomial(4)) for num_steps in (8, 32))
    assert many <= 1.02 * few


def test_pinned_states_take_no_memory_of_the_device():
    """Of 16 states two are there at a time: the one in hand, and the one that is fetched beside it."""
    state_bytes = 12 * 8_004_000
    on_device = peak(16, schedule=mg.EveryStep())
    on_host = peak(16, schedule=mg.EveryStep(), store=mg.PinnedStore())
    assert on_device - on_host >= 12 * state_bytes


def test_the_precision_of_products_is_the_users():
    metric, step, *others = large(2)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(ValueError, match="tf32"):
            mg.metagradient(metric, step, *others)
        mg.metagradient(metric, replace(step), *others, allow_low_precision=True)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
