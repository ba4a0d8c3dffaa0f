"""Every hyperparameter may be a tensor in `meta`; its gradient is exact."""

import pytest
import torch
import torchopt
from agreement import assert_agree
from problems import PROBLEMS

import metagrad as mg


def sgd(values):
    return mg.optim.sgd(values["lr"], values["momentum"], values["dampening"], weight_decay=values["weight_decay"])


def nesterov(values):
    return mg.optim.sgd(values["lr"], values["momentum"], values["dampening"], True, values["weight_decay"])


def adam(values):
    return mg.optim.adam(**adam_arguments(values))


def adamw(values):
    return mg.optim.adamw(**adam_arguments(values))


def adam_arguments(values):
    betas = values["beta1"], values["beta2"]
    return {"betas": betas, **{name: values[name] for name in ("lr", "eps", "eps_root", "weight_decay")}}


def clipped(values):
    return torchopt.chain(mg.optim.clip(values["clip"]), mg.optim.sgd(values["lr"]))


MOMENTUM = {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.3}
ADAM = {"lr": 0.1, "beta1": 0.7, "beta2": 0.8, "eps": 0.05, "eps_root": 0.02, "weight_decay": 0.3}
TABLE = [(sgd, MOMENTUM), (nesterov, MOMENTUM), (adam, ADAM), (adamw, ADAM), (clipped, {"lr": 0.1, "clip": 0.2})]


@pytest.mark.parametrize(
    "make, values, name",
    [(make, values, name) for make, values in TABLE for name in values],
    ids=[f"{make.__name__}-{name}" for make, values in TABLE for name in values],
)
def test_one_hyperparameter_at_a_time(make, values, name):
    problem = PROBLEMS["mlp"](4)
    step = mg.TrainStep(lambda p, b, meta: problem.loss(p, b), lambda meta: make({**values, name: meta[name]}))
    arguments = problem.metric, step, problem.params, problem.batches, {name: torch.tensor(values[name])}
    result = mg.metagradient(*arguments, schedule=mg.Binomial(2))
    assert_agree(result, mg.check.unrolled(*arguments), rtol=1e-9)
    differences = mg.check.finite_differences(*arguments, num_directions=1)
    assert differences.derivatives.abs() > 1e-4
    assert differences.relative_error(result).max() <= 1e-6


@pytest.mark.parametrize("make, values", TABLE, ids=[make.__name__ for make, _ in TABLE])
def test_all_of_them_with_weights_and_initial_parameters(make, values):
    problem = PROBLEMS["mlp"](4)
    meta = {**problem.meta, **{name: torch.tensor(value) for name, value in values.items()}}
    step = mg.TrainStep(mg.weighted(problem.loss), make, microbatch_size=2)
    arguments = problem.metric, step, problem.params, problem.batches, meta
    result = mg.metagradient(*arguments, wrt_params=True)
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)
    assert mg.check.finite_differences(*arguments, wrt_params=True).relative_error(result).max() <= 1e-6


def test_a_learning_rate_for_each_parameter():
    problem = PROBLEMS["mlp"](3)
    rates = {name: torch.full_like(value, 0.1) for name, value in problem.params.items()}

    def scaled(meta):
        scale = torchopt.base.GradientTransformation(
            lambda params: (),
            lambda updates, state, *, params=None, inplace=False: (
                {name: -meta[name] * update for name, update in updates.items()},
                state,
            ),
        )
        return scale

    step = mg.TrainStep(lambda p, b, meta: problem.loss(p, b), scaled)
    arguments = problem.metric, step, problem.params, problem.batches, rates
    result = mg.metagradient(*arguments)
    assert_agree(result, mg.check.unrolled(*arguments), rtol=1e-9)
    assert mg.check.finite_differences(*arguments).relative_error(result).max() <= 1e-6


def test_a_schedule_of_learning_rates_by_step():
    """The rate of step t is meta["rates"][t]: on w ↦ w(1 − 2 rate x²) the gradient is a product written by hand."""
    rates = torch.tensor([0.1, 0.2, 0.3])
    step = mg.TrainStep(lambda p, b, meta: p["w"] ** 2 * meta["rates"][b["step"]], lambda meta: mg.optim.sgd(1.0))
    batches = [{"step": torch.tensor([t])} for t in range(3)]
    result = mg.metagradient(lambda s: s.params["w"] + 0, step, {"w": torch.tensor(2.0)}, batches, {"rates": rates})
    factors = 1 - 2 * rates  # 0.8, 0.6, 0.4
    wanted = 2.0 * -2 * torch.stack([factors[1] * factors[2], factors[0] * factors[2], factors[0] * factors[1]])
    torch.testing.assert_close(result.meta["rates"], wanted, rtol=1e-14, atol=0)
