"""Steps that a user writes: exact through everything in their state, reproducible, and refused where a graph is cut."""

from typing import Any

import pytest
import torch
from agreement import assert_agree, assert_same_bits, relative_error
from optimizers import OPTIMIZERS
from problems import PROBLEMS
from torch import nn
from torch.func import functional_call

import metagrad as mg


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class HeavyBall:
    """SGD with momentum written out; the momentum is a metaparameter."""

    def __init__(self, loss):
        self.loss = loss

    def init(self, params, meta):
        return mg.State(params, optimizer={name: torch.zeros_like(value) for name, value in params.items()})

    def __call__(self, state, batch, meta):
        loss = (meta["weights"][batch["index"]] * self.loss(state.params, batch)).mean()
        gradients = torch.autograd.grad(loss, list(state.params.values()), create_graph=True)
        velocity = {
            name: meta["momentum"] * state.optimizer[name] + g
            for (name, g) in zip(state.params, gradients, strict=True)
        }
        params = {name: p - 0.05 * velocity[name] for name, p in state.params.items()}
        return state._replace(params=params, optimizer=velocity)


class Duel:
    """Two players in turn, each descending a loss of its own: the second sees the first one's move."""

    def init(self, params, meta):
        return mg.State(params)

    def __call__(self, state, batch, meta):
        x, y = state.params["x"], state.params["y"]
        value = (x * y * batch).sum() + 0.1 * (x**4).sum() - 0.2 * (y**2).sum()
        x = x - meta["rate"] * torch.autograd.grad(value, x, create_graph=True)[0]
        value = (x * y * batch).sum() + 0.1 * (x**4).sum() - 0.2 * (y**2).sum()
        y = y + meta["rate"] * torch.autograd.grad(value, y, create_graph=True)[0]
        return state._replace(params={"x": x, "y": y})


class Windows:
    """A recurrent net on windows of one long series: its hidden state goes on from window to window."""

    def init(self, params, meta):
        return mg.State(params, optimizer={"hidden": torch.zeros(4)})

    def __call__(self, state, batch, meta):
        hidden, losses = state.optimizer["hidden"], []
        for x, target in zip(batch, batch[1:], strict=False):
            hidden = torch.tanh(state.params["recurrent"] @ hidden + state.params["input"] * x)
            losses.append((hidden @ state.params["output"] - target) ** 2)
        loss = torch.stack(losses).mean() + meta["decay"] * sum(p.square().sum() for p in state.params.values())
        gradients = torch.autograd.grad(loss, list(state.params.values()), create_graph=True)
        params = {name: p - 0.1 * g for (name, p), g in zip(state.params.items(), gradients, strict=True)}
        return state._replace(params=params, optimizer={"hidden": hidden})


class Noisy(nn.Module):
    """A net with batch norm and dropout, trained by a step of one's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))

    def init(self, params, meta):
        return mg.State(dict(params.named_parameters()), dict(params.named_buffers()))

    def __call__(self, state, batch, meta):
        variables = {**state.params, **state.buffers}
        loss = (meta["scale"] * functional_call(self.net, variables, (batch,))).square().mean()
        gradients = torch.autograd.grad(loss, list(state.params.values()), create_graph=True)
        params = {name: p - 0.1 * g for (name, p), g in zip(state.params.items(), gradients, strict=True)}
        return state._replace(params=params, buffers={name: variables[name] for name in state.buffers})


def heavy_ball() -> tuple[Any, ...]:
    problem = PROBLEMS["mlp"](6)
    meta = {**problem.meta, "momentum": torch.tensor(0.8)}
    return problem.metric, HeavyBall(problem.loss), problem.params, problem.batches, meta


def duel() -> tuple[Any, ...]:
    params = {"y": drawn(3, seed=1), "x": drawn(3, seed=2)}
    batches = list(drawn(5, 3, seed=3))
    return lambda s: (s.params["x"] * s.params["y"]).sum(), Duel(), params, batches, {"rate": torch.tensor(0.1)}


def windows() -> tuple[Any, ...]:
    params = {"recurrent": 0.5 * drawn(4, 4, seed=1), "input": drawn(4, seed=2), "output": drawn(4, seed=3)}

    def metric(state):
        return (state.optimizer["hidden"] @ state.params["output"] - 0.3) ** 2

    return metric, Windows(), params, list(drawn(30, seed=4).split(5)), {"decay": torch.tensor(0.01)}


def noisy() -> tuple[Any, ...]:
    step = Noisy()

    def metric(state):
        return state.buffers["1.running_var"].sum() + state.params["0.weight"].square().sum()

    return metric, step, step.net, list(drawn(4, 6, 3, seed=5)), {"scale": torch.tensor(1.3)}


def normed() -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1))
    step = HeavyBall(lambda params, batch: functional_call(net, params, batch["x"]).square().squeeze(1))
    batches = [{"x": x, "index": torch.arange(6)} for x in drawn(3, 6, 3, seed=6)]
    meta = {"weights": torch.ones(6), "momentum": torch.tensor(0.8)}
    params = dict(net.named_parameters())
    return lambda s: s.params["0.parametrizations.weight.original0"].square().sum(), step, params, batches, meta


OWN = {build.__name__: build for build in (heavy_ball, duel, windows, noisy)}
SCHEDULES = [mg.EveryStep(), mg.Binomial(1), mg.Binomial(2), mg.Tree(2)]


def test_weight_norm_which_torch_differentiates_wrongly_is_right_in_it():
    arguments = normed()
    found = mg.metagradient(*arguments, wrt_params=True)
    assert mg.check.finite_differences(*arguments, wrt_params=True).relative_error(found).max() <= 1e-6


@pytest.mark.parametrize("name", OWN)
def test_a_step_of_ones_own_is_exact(name):
    arguments = OWN[name]()
    results = [mg.metagradient(*arguments, schedule=schedule, wrt_params=True) for schedule in SCHEDULES]
    for other in results[1:]:
        assert_same_bits(other, results[0])
    assert_agree(results[0], mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)
    differences = mg.check.finite_differences(*arguments, wrt_params=True)
    assert differences.relative_error(results[0]).max() <= 1e-6


def test_it_is_that_of_a_train_step():
    metric, _, params, batches, meta = heavy_ball()
    own = mg.metagradient(*heavy_ball(), wrt_params=True)
    ours = mg.metagradient(
        metric,
        PROBLEMS["mlp"](6).step(OPTIMIZERS["momentum"]),
        params,
        batches,
        {"weights": meta["weights"]},
        wrt_params=True,
    )
    assert relative_error(own.meta["weights"], ours.meta["weights"]) <= 1e-14
    for name in params:
        assert relative_error(own.params[name], ours.params[name]) <= 1e-14


def test_the_initial_hidden_state_has_a_gradient():
    arguments = windows()
    gradient = mg.metagradient(*arguments, wrt_params=True).optimizer["hidden"]
    metric, step, params, batches, meta = arguments
    start = mg.State(params, optimizer={"hidden": torch.zeros(4, requires_grad=True)})
    metric(mg.train(step, start, batches, meta)).backward()
    assert torch.equal(gradient, start.optimizer["hidden"].grad)
    moved = [
        float(metric(mg.train(step, start._replace(optimizer={"hidden": torch.eye(4)[0] * h}), batches, meta)))
        for h in (1e-5, -1e-5)
    ]
    assert relative_error(gradient[0], torch.tensor((moved[0] - moved[1]) / 2e-5)) <= 1e-6


def test_the_random_numbers_of_the_caller_are_left_alone():
    arguments = noisy()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = mg.metagradient(*arguments)
    assert torch.equal(torch.rand(2), expected)
    assert_same_bits(mg.metagradient(*arguments), first)


class Wrong(Duel):
    """Two players, with one thing wrong."""

    def __init__(self, wrong):
        self.wrong = wrong

    def init(self, params, meta):
        initial = {
            "no state": params,
            "nothing": mg.State({"n": torch.arange(3)}),
            "from meta": mg.State({name: value * meta["rate"] for name, value in params.items()}),
        }
        return initial.get(self.wrong, mg.State(params))

    def __call__(self, state, batch, meta):
        x = state.params["x"]
        loss = (x**2).sum()
        if self.wrong == "cut":
            return state._replace(params={**state.params, "x": x - torch.autograd.grad(loss, x)[0]})
        if self.wrong == "backward":
            loss.backward()
        returned = {
            "no step": None,
            "lost": state._replace(params={"x": x}),
            "reshaped": state._replace(params={**state.params, "x": x[:2]}),
            "rounded": state._replace(params={**state.params, "x": x.float()}),
        }
        return returned.get(self.wrong, state)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("no state", r"`init` of Wrong returned \{'y'.*mg\.State\(params\)"),
        ("nothing", "holds no floating-point tensor"),
        ("from meta", "initial state from `meta`.*mg.train"),
        ("cut", "without create_graph=True.*detach"),
        ("backward", r"calls backward\(\).*create_graph=True"),
        ("no step", "Wrong returned a NoneType.*_replace"),
        ("lost", r"the state after Wrong .* lacks \.params\['y'\], and adds nothing"),
        ("reshaped", r"shape \(2,\), where .*shape \(3,\) was expected"),
        ("rounded", "float32 .*, where .*float64 .* was expected"),
    ],
)
def test_what_is_wrong_is_refused(wrong, message):
    _, _, params, batches, meta = duel()
    with pytest.raises(ValueError, match=message):
        mg.metagradient(lambda s: s.params["x"].sum(), Wrong(wrong), params, batches, meta)


def test_batches_that_can_be_read_once_are_refused():
    metric, step, params, batches, meta = duel()
    with pytest.raises(ValueError, match="read once"):
        mg.metagradient(metric, step, params, iter(batches), meta)
    with pytest.raises(ValueError, match="empty"):
        mg.metagradient(metric, step, params, [], meta)
