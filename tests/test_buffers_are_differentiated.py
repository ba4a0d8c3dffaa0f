"""Buffers are state like any other: a metric or a loss that reads them is differentiated through them, exactly."""

from copy import deepcopy

import pytest
import torch
from agreement import assert_agree, relative_error
from optimizers import OPTIMIZERS
from torch import nn
from torch.func import functional_call
from torch.nn.functional import batch_norm, instance_norm, mse_loss

import metagrad as mg
from metagrad._buffers import DifferentiableStatistics


class Normalised(nn.Module):
    """A normalisation layer between two linear ones, on three channels of length five."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(5, 5), norm, nn.Linear(15, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.first(x))).flatten(1))


NORMS = {
    "batch norm": nn.BatchNorm1d(3),
    "cumulative batch norm": nn.BatchNorm1d(3, momentum=None),
    "plain batch norm": nn.BatchNorm1d(3, affine=False),
    "instance norm": nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
}


def normalised(norm, optimizer="adam", **options):
    """The arguments of `metagradient` for a metric that evaluates the model by its running statistics."""
    torch.manual_seed(0)
    model = Normalised(deepcopy(NORMS[norm])).train()
    judge = deepcopy(model).eval()
    x, y = torch.randn(8, 3, 5), torch.randn(8, 2)
    batches = [{"index": i, "x": x[i], "y": y[i]} for i in torch.arange(12).remainder(8).split(4)]
    step = mg.TrainStep(
        mg.weighted(lambda p, b: (functional_call(model, p, (b["x"],)) - b["y"]).square().sum(1)),
        OPTIMIZERS[optimizer],
        **options,
    )

    def metric(state):
        return mse_loss(functional_call(judge, {**state.params, **state.buffers}, (x,)), y)

    return metric, step, model, batches, {"weights": 1 + 0.1 * torch.randn(8)}


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"microbatch_size": 3}], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_metric_that_reads_running_statistics_is_exact(norm, options):
    arguments = normalised(norm, **options)
    result = mg.metagradient(*arguments, schedule=mg.Binomial(2), wrt_params=True)
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)
    assert mg.check.finite_differences(*arguments, wrt_params=True).relative_error(result).max() <= 1e-6


def test_initial_statistics_have_a_gradient():
    metric, step, model, batches, meta = normalised("batch norm")
    result = mg.metagradient(metric, step, model, batches, meta, wrt_params=True)
    assert result.buffers["norm.num_batches_tracked"] is None
    # mean_T = (1 − m)^T mean_0 + …, and training itself does not read it.
    mean = result.state.buffers["norm.running_mean"].clone().requires_grad_()
    with DifferentiableStatistics():
        value = metric(result.state._replace(buffers={**result.state.buffers, "norm.running_mean": mean}))
    at_end = torch.autograd.grad(value, mean)[0]
    assert relative_error(result.buffers["norm.running_mean"], 0.9**3 * at_end) <= 1e-12


def test_constant_buffers_on_request():
    metric, step, model, batches, meta = normalised("batch norm", constant_buffers=True)

    def detached(state):
        return metric(state._replace(buffers={name: value.detach() for name, value in state.buffers.items()}))

    result = mg.metagradient(metric, step, model, batches, meta)
    by_hand = mg.metagradient(detached, normalised("batch norm")[1], model, batches, meta)
    assert relative_error(result.meta["weights"], by_hand.meta["weights"]) <= 1e-14
    exact = mg.metagradient(metric, normalised("batch norm")[1], model, batches, meta)
    assert relative_error(result.meta["weights"], exact.meta["weights"]) > 1e-3


class Centred(nn.Module):
    """A loss that reads a buffer, and writes a differentiable value into it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mean", torch.tensor(0.2))

    def forward(self, x):
        self.mean.mul_(0.5).add_((self.w * x).mean())
        return (self.w * x - self.mean) ** 2


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_a_loss_that_reads_what_it_wrote_is_exact(microbatch_size):
    model = Centred()
    step = mg.TrainStep(
        lambda p, b, meta: meta["w"][b["index"]] * functional_call(model, p, (b["x"],)),
        mg.optim.sgd(0.1),
        microbatch_size=microbatch_size,
    )
    batches = [{"x": torch.tensor([1.0, -2.0]) + t, "index": torch.arange(2)} for t in range(4)]
    meta = {"w": torch.tensor([1.0, 0.7])}
    arguments = lambda s: s.params["w"] * s.buffers["mean"], step, model, batches, meta
    result = mg.metagradient(*arguments, schedule=mg.Binomial(1), wrt_params=True)
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-12)
    assert mg.check.finite_differences(*arguments, wrt_params=True).relative_error(result).max() <= 1e-6


@pytest.mark.parametrize("function, switch", [(batch_norm, "training"), (instance_norm, "use_input_stats")])
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_layers_are_those_of_torch(function, switch, on, affine):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 3, 5, 2), torch.randn(3), torch.randn(3)
    ours, theirs = ([torch.randn(3), torch.rand(3)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        mine.copy_(other).requires_grad_(not on)
    extra = {switch: on, "weight": weight if affine else None, "bias": bias if affine else None, "momentum": 0.3}
    with DifferentiableStatistics():
        result = function(x, *ours, **extra)
    torch.testing.assert_close(result, function(x, *theirs, **extra), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
