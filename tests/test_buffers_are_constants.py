"""Buffers are carried as constants: a metric or a loss that would need their derivative is refused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import metagrad as mg


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x)).square().sum(1)


def normalised(metric_of):
    torch.manual_seed(0)
    model = Normalised()
    calls = []

    def loss(params, batch):
        calls.append(batch)
        return functional_call(model.train(), params, (batch["x"],))

    x = torch.randn(4, 3)
    arguments = {
        "metric": lambda state: functional_call(model.eval(), metric_of(state), (x,)).mean(),
        "step": mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.1)),
        "params": model,
        "batches": [{"x": x, "index": torch.arange(4)}] * 3,
        "meta": {"weights": torch.ones(4)},
    }
    return arguments, calls


def both(state):
    return {**state.params, **state.buffers}


def test_a_metric_that_reads_running_statistics_is_refused():
    arguments, _ = normalised(both)
    with pytest.raises(ValueError, match="running statistics.*incomplete.*b.detach"):
        mg.metagradient(**arguments)


def test_a_metric_that_detaches_running_statistics_is_taken_at_its_word():
    def detached(state):
        return {**state.params, **{name: value.detach() for name, value in state.buffers.items()}}

    assert mg.metagradient(**normalised(detached)[0]).meta["weights"].abs().sum() > 0


class Counting(nn.Module):
    """Writes a differentiable value into a buffer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mean", torch.tensor(0.0))

    def forward(self, x):
        self.mean.add_((self.w * x).mean())
        return (self.w * x - self.mean) ** 2


def test_a_metric_that_reads_any_other_moving_buffer_is_refused():
    class Detached(Counting):
        def forward(self, x):
            self.mean.add_((self.w * x).mean().detach())
            return (self.w * x) ** 2

    model = Detached()
    step = mg.TrainStep(lambda p, b, meta: functional_call(model, p, (b,)), mg.optim.sgd(0.1))
    with pytest.raises(ValueError, match="the metric reads the buffers mean, which training changes"):
        mg.metagradient(lambda s: s.params["w"] * s.buffers["mean"], step, model, [torch.ones(2)] * 2, {})


def test_a_loss_that_writes_a_graph_into_a_buffer_is_refused():
    model = Counting()
    step = mg.TrainStep(lambda p, b, meta: functional_call(model, p, (b,)), mg.optim.sgd(0.1))
    with pytest.raises(ValueError, match="differentiable value into buffer 'mean'.*Detach"):
        mg.metagradient(lambda s: s.params["w"] * 1, step, model, [torch.ones(2)] * 2, {})
