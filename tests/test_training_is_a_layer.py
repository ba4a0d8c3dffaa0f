"""`mg.train` is an ordinary differentiable function of `meta` and the initial parameters."""

import gc
import weakref

import pytest
import torch
from agreement import relative_error
from optimizers import OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS, mlp
from torch import nn

import metagrad as mg


def leaf(meta):
    return {name: value.clone().requires_grad_() for name, value in meta.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_bits_as_metagradient(optimizer):
    metric, step, params, batches, meta = PROBLEMS["mlp"](5).arguments(OPTIMIZERS[optimizer])
    expected = mg.metagradient(metric, step, params, batches, meta)
    meta = leaf(meta)
    state = mg.train(step, params, batches, meta)
    metric(state).backward()
    assert torch.equal(meta["weights"].grad, expected.meta["weights"])
    assert all(torch.equal(state.params[key], expected.state.params[key]) for key in state.params)


@pytest.mark.parametrize("name", ["cnn", "gpt2", "llama", "frozen", "shared"])
def test_module_parameters_receive_their_gradient(name):
    problem = {**PROBLEMS, **ODD_PROBLEMS}[name](3)
    metric, step, model, batches, meta = problem.arguments(OPTIMIZERS["adam"])
    expected = mg.metagradient(metric, step, model, batches, meta, wrt_params=True)
    meta = leaf(meta)
    try:
        metric(mg.train(step, model, batches, meta)).backward()
        received = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert received.keys() == expected.params.keys()
        assert all(torch.equal(received[key], expected.params[key]) for key in received)
        assert torch.equal(meta["weights"].grad, expected.meta["weights"])
    finally:
        model.zero_grad()  # The problem is shared between tests.


def test_it_composes_with_what_makes_the_weights_and_what_reads_the_parameters():
    problem = PROBLEMS["mlp"](4)
    metric, step, params, batches, _ = problem.arguments(OPTIMIZERS["momentum"])
    scorer = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index, parameter in enumerate(scorer.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + 0.1 * index)

    def outer(trained):
        return metric(trained).exp() + trained.params["b"].sum()

    weights = torch.nn.functional.softplus(scorer(features).squeeze(1))
    outer(mg.train(step, params, batches, {"weights": weights})).backward()

    # The chain rule by hand, with the metagradient in the middle.
    inner = mg.metagradient(outer, step, params, batches, {"weights": weights.detach()})
    weights = torch.nn.functional.softplus(scorer(features).squeeze(1))
    wanted = torch.autograd.grad(weights, list(scorer.parameters()), inner.meta["weights"])
    for parameter, gradient in zip(scorer.parameters(), wanted, strict=True):
        assert relative_error(parameter.grad, gradient) <= 1e-14


def test_a_second_backward_says_what_to_do():
    metric, step, params, batches, meta = PROBLEMS["mlp"](3).arguments(OPTIMIZERS["sgd"])
    state = mg.train(step, params, batches, leaf(meta))
    metric(state).backward()
    with pytest.raises(RuntimeError, match="already walked back.*sum several losses first.*train again"):
        metric(state).backward()


def test_a_second_derivative_is_refused():
    metric, step, params, batches, meta = PROBLEMS["mlp"](2).arguments(OPTIMIZERS["sgd"])
    meta = leaf(meta)
    (gradient,) = torch.autograd.grad(metric(mg.train(step, params, batches, meta)), meta["weights"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_later_changes_do_not_reach_the_replay():
    problem = mlp(4)
    metric, step, params, batches, meta = problem.arguments(OPTIMIZERS["adam"])
    expected = mg.metagradient(metric, step, params, batches, meta, schedule=mg.Binomial(1))
    meta = leaf(meta)
    state = mg.train(step, params, batches, meta, schedule=mg.Binomial(1))
    value = metric(state)
    with torch.no_grad():
        meta["weights"].mul_(5)
        params["a"].zero_()
    value.backward()
    assert torch.equal(meta["weights"].grad, expected.meta["weights"])


def test_later_changes_of_a_module_do_not_reach_the_replay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    problem = PROBLEMS["mlp"](4)
    step = mg.TrainStep(
        mg.weighted(lambda p, b: (torch.func.functional_call(model, p, (b["x"],)) - b["y"]).square().sum(1)),
        OPTIMIZERS["momentum"],
    )
    expected = mg.metagradient(lambda s: s.params["3.bias"].sum(), step, model, problem.batches, problem.meta)
    meta = leaf(problem.meta)
    state = mg.train(step, model, problem.batches, meta, schedule=mg.Binomial(1))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    state.params["3.bias"].sum().backward()
    assert relative_error(meta["weights"].grad, expected.meta["weights"]) <= 1e-14


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_two_runs_after_one_another_are_one_run(name, optimizer):
    """The trained state carries its graph in parameters, buffers and optimizer alike."""
    metric, step, params, batches, meta = PROBLEMS[name](5).arguments(OPTIMIZERS[optimizer])
    whole = mg.metagradient(metric, step, params, batches, meta, wrt_params=True)
    start = step.init(params, meta)
    start = start._replace(params={name: value.requires_grad_() for name, value in start.params.items()})
    weights = leaf(meta)
    middle = mg.train(step, start, batches[:2], weights)
    assert middle.step == 2
    metric(mg.train(step, middle, batches[2:], weights)).backward()
    assert relative_error(weights["weights"].grad, whole.meta["weights"]) <= 1e-12
    for name, value in start.params.items():
        assert relative_error(value.grad, whole.params[name]) <= 1e-12


def test_without_anything_to_differentiate_the_result_is_plain():
    _, step, params, batches, meta = PROBLEMS["mlp"](2).arguments(OPTIMIZERS["sgd"])
    assert not any(value.requires_grad for value in mg.train(step, params, batches, meta).params.values())


@pytest.mark.parametrize("backward", [False, True])
def test_a_run_that_is_let_go_frees_its_states(backward):
    def velocity_of_a_run():
        metric, step, params, batches, meta = PROBLEMS["mlp"](3).arguments(OPTIMIZERS["momentum"])
        state = mg.train(step, params, batches, leaf(meta))
        if backward:
            metric(state).backward()
        return weakref.ref(state.optimizer.velocity["a"])

    kept = velocity_of_a_run()
    gc.collect()
    assert kept() is None
