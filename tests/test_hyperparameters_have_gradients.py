"""Every hyperparameter may be a tensor in `meta`, by itself or inside a schedule; its gradient is exact."""

import pytest
import torch
import torchopt
from agreement import assert_agree, relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from problems import PROBLEMS
from torch import Tensor

import metagrad as mg

NUM_STEPS = 4


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


def muon(values):
    others = mg.optim.adamw(values["other_lr"], eps_root=1e-3)
    return mg.optim.muon(values["lr"], values["momentum"], weight_decay=values["weight_decay"], others=others)


def by_layer(values):
    """Its own learning rate and decay, coupled or not, for each parameter."""
    return mg.optim.groups(
        lambda name, tensor: name,
        {
            "a": mg.optim.sgd(values["lr_a"], weight_decay=values["decay_a"]),
            "b": mg.optim.sgd(values["lr_b"], 0.8),
            "c": mg.optim.adamw(values["lr_c"], eps_root=1e-3, weight_decay=values["decay_c"]),
        },
    )


def per_step(values):
    """One learning rate for each step."""
    return mg.optim.sgd(lambda step: values["lr"][step], momentum=0.5)


def linear(values):
    return mg.optim.sgd(torchopt.schedule.linear_schedule(values["first"], values["last"], NUM_STEPS - 1), 0.5)


def polynomial(values):
    schedule = torchopt.schedule.polynomial_schedule(values["first"], values["last"], values["power"], 8, 1)
    return mg.optim.adam(schedule, eps_root=1e-3)


def exponential(values):
    return torchopt.chain(
        mg.optim.clip(torchopt.schedule.exponential_decay(values["norm"], values["norm_rate"])),
        mg.optim.sgd(0.1, torchopt.schedule.exponential_decay(values["momentum"], values["momentum_rate"], 1, 2)),
    )


def foreign(values):
    """TorchOpt's own Adam, which takes these as tensors."""
    return torchopt.adam(values["lr"], eps=values["eps"], eps_root=values["eps_root"])


MOMENTUM = {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.3}
ADAM = {"lr": 0.1, "beta1": 0.7, "beta2": 0.8, "eps": 0.05, "eps_root": 0.02, "weight_decay": 0.3}
TABLE = [
    (sgd, MOMENTUM),
    (nesterov, MOMENTUM),
    (adam, ADAM),
    (adamw, ADAM),
    (clipped, {"lr": 0.1, "clip": 0.2}),
    (muon, {"lr": 0.03, "momentum": 0.7, "weight_decay": 0.3, "other_lr": 0.1}),
    (by_layer, {"lr_a": 0.1, "lr_b": 0.2, "lr_c": 0.05, "decay_a": 0.3, "decay_c": 0.2}),
    (per_step, {"lr": [0.2, 0.1, 0.05, 0.3]}),
    (linear, {"first": 0.2, "last": 0.05}),
    (polynomial, {"first": 0.2, "last": 0.05, "power": 2.0}),
    (exponential, {"norm": 0.3, "norm_rate": 0.8, "momentum": 0.9, "momentum_rate": 0.7}),
    (foreign, {"lr": 0.1, "eps": 0.05, "eps_root": 0.02}),
]


def constants(values) -> dict:
    """`values` as they are given without a gradient: numbers, and one number per step."""
    return {name: torch.tensor(value) if isinstance(value, list) else value for name, value in values.items()}


def check(make, values, chosen, *, weights: bool, **options) -> mg.Result:
    """Compare the gradients of the `chosen` hyperparameters, together, with both referees."""
    problem = PROBLEMS["mlp"](NUM_STEPS)
    meta: dict[str, Tensor] = {name: torch.tensor(values[name]) for name in chosen}
    loss = mg.weighted(problem.loss) if weights else lambda p, b, meta: problem.loss(p, b)
    step = mg.TrainStep(loss, lambda meta: make({**constants(values), **meta}), **options)
    arguments = problem.metric, step, problem.params, problem.batches, {**meta, **(problem.meta if weights else {})}
    result = mg.metagradient(*arguments, schedule=mg.Binomial(2), wrt_params=weights)
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=weights), rtol=1e-9)
    differences = mg.check.finite_differences(*arguments, num_directions=1, wrt_params=weights)
    assert differences.derivatives.abs() > 1e-5
    assert differences.relative_error(result).max() <= 1e-6
    return result


@pytest.mark.parametrize(
    "make, values, name",
    [(make, values, name) for make, values in TABLE for name in values],
    ids=[f"{make.__name__}-{name}" for make, values in TABLE for name in values],
)
def test_one_hyperparameter_at_a_time(make, values, name):
    result = check(make, values, [name], weights=False)
    assert result.meta[name].shape == torch.tensor(values[name]).shape
    assert (result.meta[name] != 0).all()


@pytest.mark.parametrize("make, values", TABLE, ids=[make.__name__ for make, _ in TABLE])
def test_all_of_them_with_weights_and_initial_parameters(make, values):
    check(make, values, values, weights=True, microbatch_size=2)


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(
    case=st.sampled_from(TABLE).flatmap(
        lambda row: st.tuples(st.just(row[0]), st.just(row[1]), st.sets(st.sampled_from(sorted(row[1])), min_size=1))
    ),
    weights=st.booleans(),
    microbatch_size=st.sampled_from([None, 1, 3]),
    clip_norm=st.sampled_from([None, 0.3]),
)
def test_any_mixture_of_hyperparameters_in_one_replay(case, weights, microbatch_size, clip_norm):
    make, values, chosen = case
    check(make, values, sorted(chosen), weights=weights, microbatch_size=microbatch_size, clip_norm=clip_norm)


def test_a_learning_rate_for_each_entry_is_a_transformation_of_the_user():
    problem = PROBLEMS["mlp"](3)
    rates = {name: torch.full_like(value, 0.1) for name, value in problem.params.items()}

    def scaled(meta):
        return mg.optim.GradientTransformation(
            lambda params: (),
            lambda updates, state, *, params=None, inplace=False: (
                {name: -meta[name] * update for name, update in updates.items()},
                state,
            ),
        )

    step = mg.TrainStep(lambda p, b, meta: problem.loss(p, b), scaled)
    arguments = problem.metric, step, problem.params, problem.batches, rates
    result = mg.metagradient(*arguments)
    assert_agree(result, mg.check.unrolled(*arguments), rtol=1e-9)
    assert mg.check.finite_differences(*arguments).relative_error(result).max() <= 1e-6


def test_a_learning_rate_for_each_step_in_closed_form():
    """On w ↦ w(1 − 2 lr_t) the gradient is a product written by hand."""
    rates = torch.tensor([0.1, 0.2, 0.3])
    step = mg.TrainStep(
        lambda p, b, meta: p["w"] ** 2 * b, lambda meta: mg.optim.sgd(lr=lambda step: meta["rates"][step])
    )
    result = mg.metagradient(
        lambda s: s.params["w"] + 0, step, {"w": torch.tensor(2.0)}, [torch.ones(1)] * 3, {"rates": rates}
    )
    factors = 1 - 2 * rates  # 0.8, 0.6, 0.4
    wanted = 2.0 * -2 * torch.stack([factors[1] * factors[2], factors[0] * factors[2], factors[0] * factors[1]])
    assert relative_error(result.meta["rates"], wanted) <= 1e-14


def test_a_constant_is_the_same_as_a_schedule_that_returns_it():
    """The tensor of a schedule enters as the tensor itself does, bit for bit."""
    problem = PROBLEMS["mlp"](NUM_STEPS)

    def gradients(wrap) -> list[Tensor]:
        meta = {name: torch.tensor(value) for name, value in ADAM.items()}
        step = mg.TrainStep(
            lambda p, b, meta: problem.loss(p, b), lambda meta: adamw({n: wrap(v) for n, v in meta.items()})
        )
        return list(mg.metagradient(problem.metric, step, problem.params, problem.batches, meta).meta.values())

    for constant, scheduled in zip(
        gradients(lambda value: value), gradients(lambda value: lambda step: value), strict=True
    ):
        assert torch.equal(constant, scheduled)


@pytest.fixture
def float32():
    """The default precision of a user."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def test_schedules_of_torchopt_count_in_double_precision(float32):
    """A third is no number of float32: the schedule's fraction must not pass through one."""
    optimizer = mg.optim.sgd(torchopt.schedule.linear_schedule(1.0, 0.0, 3))
    step = mg.TrainStep(lambda p, b, meta: p["w"] * b, optimizer)
    start, batch = torch.tensor(0.0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    state = mg.train(step, {"w": start}, [batch] * 5, {})
    assert float(state.params["w"]) == pytest.approx(-(1 + 2 / 3 + 1 / 3), rel=1e-15)
