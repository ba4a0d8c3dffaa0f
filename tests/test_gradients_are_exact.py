"""Contract 1: 1e-9 relative against unrolled autograd, 1e-6 against finite differences, in float64."""

from types import SimpleNamespace

import pytest
import torch
from agreement import assert_agree, relative_error
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from optimizers import ALL_OPTIMIZERS, OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS, Problem
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metagrad as mg

ALL_PROBLEMS = {**PROBLEMS, **ODD_PROBLEMS}
CLIP_NORM = 0.1  # Below every gradient norm here: see `test_clipping_is_active`.
SCHEDULES = [mg.EveryStep(), *(mg.Binomial(slots) for slots in (1, 2, 3, 4))]


def check_against_unrolled(name: str, optimizer: str, num_steps: int, *, schedule: mg.Schedule, **options) -> None:
    arguments = ALL_PROBLEMS[name](num_steps).arguments(ALL_OPTIMIZERS[optimizer], **options)
    exact = mg.check.unrolled(*arguments, wrt_params=True)
    assert_agree(mg.metagradient(*arguments, schedule=schedule, wrt_params=True), exact, rtol=1e-9)
    # Without the initial parameters the first step is reversed in another way.
    weights_only = mg.metagradient(*arguments, schedule=schedule)
    assert weights_only.params is None
    assert relative_error(weights_only.meta["weights"], exact.meta["weights"]) <= 1e-9


@pytest.mark.parametrize("num_steps", [1, 2, 5, 13])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ALL_PROBLEMS)
def test_every_optimizer_on_every_problem(name, optimizer, num_steps):
    check_against_unrolled(name, optimizer, num_steps, schedule=mg.Binomial(2))


@pytest.mark.parametrize("num_steps", [1, 2, 5, 13])
@pytest.mark.parametrize("optimizer", sorted(ALL_OPTIMIZERS.keys() - OPTIMIZERS))
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_every_other_optimizer_on_two_problems(name, optimizer, num_steps):
    check_against_unrolled(name, optimizer, num_steps, schedule=mg.Binomial(2))


@pytest.mark.parametrize(
    "num_steps, schedule, options",
    [
        (1, mg.Binomial(1), {"microbatch_size": 1, "clip_norm": CLIP_NORM}),
        (2, mg.EveryStep(), {"microbatch_size": 1}),
        (5, mg.Binomial(3), {"microbatch_size": 2}),
        (5, mg.Binomial(4), {"microbatch_size": 3}),  # 4 examples in pieces of 3 and 1
        (5, mg.Binomial(1), {"microbatch_size": 100}),  # one piece, but cut
        (5, mg.Binomial(8), {"clip_norm": CLIP_NORM}),
        (13, mg.Binomial(3), {"microbatch_size": 2, "clip_norm": CLIP_NORM}),
    ],
)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_corners_of_the_step(name, optimizer, num_steps, schedule, options):
    check_against_unrolled(name, optimizer, num_steps, schedule=schedule, **options)


# Not shrunk: an example is a training run, and names its combination as it is.
@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(
    name=st.sampled_from(sorted(PROBLEMS)),
    optimizer=st.sampled_from(sorted(ALL_OPTIMIZERS)),
    num_steps=st.sampled_from([1, 2, 5, 13]),
    schedule=st.sampled_from(SCHEDULES),
    microbatch_size=st.sampled_from([None, 1, 2]),
    clip_norm=st.sampled_from([None, CLIP_NORM]),
)
@example(name="gpt2", optimizer="nesterov", num_steps=13, schedule=mg.Binomial(1), microbatch_size=1, clip_norm=0.1)
@example(name="llama", optimizer="adam", num_steps=13, schedule=mg.Binomial(2), microbatch_size=None, clip_norm=None)
def test_any_combination(name, optimizer, num_steps, schedule, microbatch_size, clip_norm):
    check_against_unrolled(
        name, optimizer, num_steps, schedule=schedule, microbatch_size=microbatch_size, clip_norm=clip_norm
    )


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["mlp", "llama", "frozen", "shared"])  # no batch statistics, no dropout
def test_micro_batches_add_up_to_the_whole_batch(name, microbatch_size):
    problem = ALL_PROBLEMS[name](3)
    whole = mg.metagradient(*problem.arguments(OPTIMIZERS["momentum"]), wrt_params=True)
    cut = problem.arguments(OPTIMIZERS["momentum"], microbatch_size=microbatch_size)
    assert_agree(mg.metagradient(*cut, wrt_params=True), whole, rtol=1e-11)


@pytest.mark.parametrize("name", PROBLEMS)
def test_clipping_is_active(name):
    problem = PROBLEMS[name](13)
    step = problem.step(OPTIMIZERS["sgd"])
    state = step.init(problem.params, problem.meta)
    for batch in problem.batches:
        new = step(state, batch, problem.meta)
        moved = torch.cat([(new.params[name] - state.params[name]).flatten() for name in new.params])
        assert torch.linalg.vector_norm(moved) / 0.1 > 2 * CLIP_NORM  # the gradient, at a learning rate of 0.1
        state = new


# Finite differences: independent of every derivative formula.


def check_against_differences(name: str, optimizer: str, num_steps: int, *, levels: int, **options) -> None:
    arguments = ALL_PROBLEMS[name](num_steps).arguments(ALL_OPTIMIZERS[optimizer], **options)
    result = mg.metagradient(*arguments, wrt_params=True)
    both = mg.check.finite_differences(*arguments, wrt_params=True, num_directions=1, num_levels=levels)
    weights = mg.check.finite_differences(*arguments, num_directions=1, num_levels=levels, seed=1)
    assert both.relative_error(result).max() <= 1e-6
    assert weights.relative_error(result).max() <= 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ALL_PROBLEMS)
def test_finite_differences_agree(name, optimizer):
    check_against_differences(name, optimizer, 2, levels=5)


@pytest.mark.parametrize("num_steps, options", [(1, {}), (5, {"clip_norm": CLIP_NORM}), (13, {"microbatch_size": 2})])
@pytest.mark.parametrize("optimizer", ALL_OPTIMIZERS)
def test_finite_differences_agree_on_longer_runs(optimizer, num_steps, options):
    check_against_differences("mlp", optimizer, num_steps, levels=6, **options)


@pytest.mark.parametrize("name", ["cnn", "gpt2", "llama"])
def test_finite_differences_agree_on_long_runs_of_models(name):
    check_against_differences(name, "adam", 13, levels=5, clip_norm=CLIP_NORM)


# The same training written out by hand: shares no line with `TrainStep`.


def heavy_ball(params: list[Tensor], gradients: tuple[Tensor, ...], memory: list | None):
    velocity = list(gradients) if memory is None else [0.8 * v + g for v, g in zip(memory, gradients, strict=True)]
    return [p - 0.05 * v for p, v in zip(params, velocity, strict=True)], velocity


def decoupled_adam(params: list[Tensor], gradients: tuple[Tensor, ...], memory: list | None):
    steps, means, squares = memory or (0, [0.0] * len(params), [0.0] * len(params))
    steps += 1
    means = [0.8 * m + 0.2 * g for m, g in zip(means, gradients, strict=True)]
    squares = [0.95 * v + 0.05 * g**2 for v, g in zip(squares, gradients, strict=True)]
    new = []
    for p, m, v in zip(params, means, squares, strict=True):
        ratio = m / (1 - 0.8**steps) / (torch.sqrt(v / (1 - 0.95**steps) + 1e-3) + 1e-6)
        new.append(p - 0.02 * 0.1 * p - 0.02 * ratio)
    return new, [steps, means, squares]


def train_by_hand(problem: Problem, update, params: dict[str, Tensor], weights: Tensor) -> Tensor:
    """The metric after training on the weighted mean loss, with a graph through all of it."""
    model = problem.params
    buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
    memory = None
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)  # the default seed of a `TrainStep`, once for the whole run
        for batch in problem.batches:
            buffers = {name: value.clone() for name, value in buffers.items()}
            loss = (weights[batch["index"]] * problem.loss({**params, **buffers}, batch)).sum() / 4
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            new, memory = update(list(params.values()), gradients, memory)
            params = dict(zip(params, new, strict=True))
    return problem.metric(SimpleNamespace(params=params, buffers=buffers))


@pytest.mark.parametrize("optimizer, update", [("momentum", heavy_ball), ("adamw", decoupled_adam)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_loop_written_by_hand_agrees(name, optimizer, update):
    problem = PROBLEMS[name](5)
    result = mg.metagradient(*problem.arguments(OPTIMIZERS[optimizer]), schedule=mg.Binomial(2), wrt_params=True)
    given = dict(problem.params.named_parameters()) if isinstance(problem.params, nn.Module) else problem.params
    start = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    weights = problem.meta["weights"].clone().requires_grad_()
    value = train_by_hand(problem, update, start, weights)
    exact = torch.autograd.grad(value, [weights, *start.values()])
    assert relative_error(result.value, value) <= 1e-9
    for computed, wanted in zip([result.meta["weights"], *(result.params[n] for n in start)], exact, strict=True):
        assert relative_error(computed, wanted) <= 1e-9


def test_one_step_of_least_squares_in_closed_form():
    # w' = w − (2 lr / n) Σ aᵢ xᵢ (xᵢ w − yᵢ),  Φ = (w' − 1)²,  dΦ/daᵢ = −2 (w' − 1) (2 lr / n) xᵢ (xᵢ w − yᵢ)
    x, y, w, lr = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor(0.7), 0.05
    weights = torch.tensor([1.0, 0.5, 2.0])
    step = mg.TrainStep(mg.weighted(lambda p, b: (b["x"] * p["w"] - b["y"]) ** 2), mg.optim.sgd(lr))
    batch = {"x": x, "y": y, "index": torch.arange(3)}
    result = mg.metagradient(lambda s: (s.params["w"] - 1) ** 2, step, {"w": w}, [batch], {"weights": weights})
    trained = w - 2 * lr / 3 * (weights * x * (x * w - y)).sum()
    wanted = -2 * (trained - 1) * 2 * lr / 3 * x * (x * w - y)
    assert relative_error(result.meta["weights"], wanted) <= 1e-14
    # The referees know this too.
    arguments = lambda s: (s.params["w"] - 1) ** 2, step, {"w": w}, [batch], {"weights": weights}
    assert relative_error(mg.check.unrolled(*arguments).meta["weights"], wanted) <= 1e-14
    differences = mg.check.finite_differences(*arguments, num_directions=4)
    exact = torch.stack([(wanted * direction["weights"]).sum() for direction in differences.meta_directions])
    assert relative_error(differences.derivatives, exact) <= 1e-10
    assert ((differences.derivatives - exact).abs() <= differences.errors + 1e-12).all()


def test_an_example_that_is_never_trained_on_has_gradient_zero():
    problem = PROBLEMS["mlp"](3)
    meta = {"weights": torch.cat([problem.meta["weights"], torch.ones(2)])}
    _, step, *_ = problem.arguments(OPTIMIZERS["adam"])
    result = mg.metagradient(problem.metric, step, problem.params, problem.batches, meta)
    assert torch.equal(result.meta["weights"][-2:], torch.zeros(2))


def test_soft_labels_and_an_unweighted_loss_get_exact_gradients():
    problem = PROBLEMS["mlp"](4)
    meta = {"labels": torch.randn(7, 2, generator=torch.Generator().manual_seed(0)), "unused": torch.ones(2)}
    step = mg.TrainStep(
        lambda params, batch, meta: problem.loss(params, {**batch, "y": meta["labels"][batch["index"]]}),
        OPTIMIZERS["adam"],
        microbatch_size=3,
    )
    arguments = problem.metric, step, problem.params, problem.batches, meta
    result = mg.metagradient(*arguments)
    assert_agree(result, mg.check.unrolled(*arguments), rtol=1e-9)
    assert mg.check.finite_differences(*arguments).relative_error(result).max() <= 1e-6


def test_a_scalar_loss_and_no_metaparameter_at_all():
    problem = PROBLEMS["mlp"](3)
    step = mg.TrainStep(lambda params, batch, meta: problem.loss(params, batch).mean(), OPTIMIZERS["momentum"])
    arguments = problem.metric, step, problem.params, problem.batches, {}
    assert_agree(
        mg.metagradient(*arguments, wrt_params=True), mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9
    )


@pytest.mark.filterwarnings("ignore:forward mode does not work")
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
def test_a_target_without_gradient_stays_a_constant_at_the_first_step(weights):
    """Forward mode does not stop at `torch.no_grad`; the first step, which uses it, must."""

    def loss(params, batch):
        with torch.no_grad():
            target = torch.sin(params["w"] * batch["x"]) * batch["teacher"]
        return (params["w"] * batch["x"] - 0.5 * target) ** 2

    step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.1))
    batch = {"x": torch.tensor([1.0, 2.0]), "teacher": torch.tensor([0.0, 1.0]), "index": torch.arange(2)}
    meta = {"weights": torch.tensor(weights)}
    arguments = lambda s: s.params["w"] ** 2, step, {"w": torch.tensor(0.5)}, [batch], meta
    assert_agree(mg.metagradient(*arguments), mg.check.unrolled(*arguments), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:forward mode does not work")
def test_centred_statistics_without_gradient_stay_constants_at_the_first_step():
    """Their errors in forward mode add up to zero over the batch, so no check of a sum can see them."""

    def loss(params, batch):
        base = (params["w"] * batch["x"] - 2 * batch["x"]) ** 2
        with torch.no_grad():
            centred = base - base.mean()
        return base + centred

    step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.01))
    batch = {"x": torch.tensor([1.0, 2.0, 3.0]), "index": torch.arange(3)}
    arguments = lambda s: s.params["w"] ** 2, step, {"w": torch.tensor(0.5)}, [batch], {"weights": torch.ones(3)}
    assert_agree(mg.metagradient(*arguments), mg.check.unrolled(*arguments), rtol=1e-9)
