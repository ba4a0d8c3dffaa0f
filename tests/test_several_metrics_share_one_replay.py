"""K metrics at once equal K single runs; metrics of intermediate states equal an unrolled run that adds them up."""

import pytest
import torch
from agreement import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import OPTIMIZERS
from problems import PROBLEMS, Problem

import metagrad as mg

SCHEDULES = [mg.EveryStep(), mg.Binomial(2), mg.Tree(2), mg.Tree(3)]


def norm_of_parameters(state):
    return sum(p.square().sum() for p in state.params.values())


def first_entry(state):
    return next(iter(state.params.values())).flatten()[0]


def gradients_of(result: mg.Result, k: int | None) -> list[torch.Tensor]:
    """Φ and all gradients, of metric k where there are several."""
    tensors = [result.value, result.meta["weights"], *(result.params or {}).values()]
    return tensors if k is None else [tensor[k] for tensor in tensors]


@pytest.mark.parametrize("wrt_params", [True, False])
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_several_equal_one_by_one(name, optimizer, microbatch_size, wrt_params):
    problem: Problem = PROBLEMS[name](5)
    _, *rest = problem.arguments(OPTIMIZERS[optimizer], microbatch_size=microbatch_size)
    metrics = [problem.metric, norm_of_parameters, mg.Trajectory({2: first_entry, 5: problem.metric})]
    together = mg.metagradient(metrics, *rest, schedule=mg.Binomial(2), wrt_params=wrt_params)
    assert together.value.shape == (3,) and together.meta["weights"].shape == (3, 7)
    for k, metric in enumerate(metrics):
        alone = mg.metagradient(metric, *rest, schedule=mg.Binomial(3), wrt_params=wrt_params)
        for ours, wanted in zip(gradients_of(together, k), gradients_of(alone, None), strict=True):
            assert relative_error(ours, wanted) <= 1e-12


def test_several_cost_one_replay():
    problem = PROBLEMS["mlp"](13)
    calls = []

    def loss(params, batch):
        calls.append(1)
        return problem.loss(params, batch)

    step = mg.TrainStep(mg.weighted(loss), OPTIMIZERS["adam"])
    counts = []
    for metrics in [problem.metric], [problem.metric, norm_of_parameters, first_entry]:
        calls.clear()
        stats = mg.metagradient(metrics, step, problem.params, problem.batches, problem.meta, wrt_params=True).stats
        counts.append((len(calls), stats.replayed, stats.reversed))
    assert counts[0] == counts[1]


@settings(max_examples=20)
@given(
    steps=st.sets(st.integers(0, 6), min_size=1),
    schedule=st.sampled_from(SCHEDULES),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    microbatch_size=st.sampled_from([None, 3]),
)
def test_a_sum_over_the_trajectory_is_exact(steps, schedule, optimizer, microbatch_size):
    problem = PROBLEMS["mlp"](6)
    metric = mg.Trajectory({t: problem.metric if t % 2 else norm_of_parameters for t in steps})
    _, step, params, batches, meta = problem.arguments(OPTIMIZERS[optimizer], microbatch_size=microbatch_size)
    result = mg.metagradient(metric, step, params, batches, meta, schedule=schedule, wrt_params=True)

    weights = meta["weights"].clone().requires_grad_()
    start = step.init(params, meta)
    state = start._replace(params={name: p.requires_grad_() for name, p in start.params.items()})
    leaves, value = [weights, *state.params.values()], torch.zeros(())
    for t in range(7):
        if t in steps:
            value = value + metric.metrics[t](state)
        if t < 6:
            state = step(state, batches[t], {"weights": weights})
    exact = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    for ours, wanted in zip(gradients_of(result, None), [value, *exact], strict=True):
        assert relative_error(ours, wanted) <= 1e-9


def test_a_metric_of_the_initial_state_alone():
    problem = PROBLEMS["mlp"](3)
    _, *rest = problem.arguments(OPTIMIZERS["sgd"])
    result = mg.metagradient(mg.Trajectory({0: norm_of_parameters}), *rest, wrt_params=True)
    assert torch.equal(result.meta["weights"], torch.zeros(7))
    for name, gradient in result.params.items():
        assert torch.equal(gradient, 2 * problem.params[name])


def bad(metric):
    problem = PROBLEMS["mlp"](3)
    _, *rest = problem.arguments(OPTIMIZERS["sgd"])
    return lambda: mg.metagradient(metric, *rest)


@pytest.mark.parametrize(
    "call, message",
    [
        (bad([]), "empty list"),
        (bad(mg.Trajectory({})), "at steps \\[\\].*states 0 to 3"),
        (bad(mg.Trajectory({4: first_entry})), "at steps \\[4\\].*states 0 to 3"),
        (bad([first_entry, 3.0]), "is a float.*list of them"),
        (bad({"loss": first_entry}), "is \\{'loss'.*function"),
    ],
)
def test_what_is_no_metric_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
