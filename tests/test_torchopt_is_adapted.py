"""A transformation of TorchOpt is taken in after it has proved itself, or refused with the reason."""

import pytest
import torch
import torchopt
from agreement import assert_agree
from problems import PROBLEMS
from torch import Tensor
from torchopt.base import EmptyState, GradientTransformation

import metagrad as mg

SCHEDULE = torchopt.schedule.linear_schedule(0.1, 0.01, 5)

GOOD = {
    "sgd": torchopt.sgd(0.1),
    "sgd with decay": torchopt.sgd(0.1, weight_decay=0.2),
    "adam": torchopt.adam(1e-3, eps_root=1e-8),
    "adam with a schedule": torchopt.adam(SCHEDULE, eps_root=1e-8),
    "adamw": torchopt.adamw(1e-3, eps_root=1e-8, weight_decay=0.2),
    "adadelta": torchopt.adadelta(1.0),
    "adamax": torchopt.adamax(1e-3),
    "rmsprop": torchopt.rmsprop(1e-3, initial_scale=0.1),
    "centered rmsprop": torchopt.rmsprop(1e-3, initial_scale=0.1, centered=True),
    "adagrad": torchopt.adagrad(1e-3, initial_accumulator_value=0.1),
    "ours in a chain": torchopt.chain(mg.optim.clip(1.0), torchopt.adam(1e-3, eps_root=1e-8)),
    "nothing": torchopt.base.identity(),
}
ROOTS = {
    "adam": torchopt.adam(1e-3),
    "adamw": torchopt.adamw(1e-3),
    "radam": torchopt.radam(1e-3),
    "rmsprop": torchopt.rmsprop(1e-3),
    "adagrad": torchopt.adagrad(1e-3),
}


def written(update) -> GradientTransformation:
    """A user's transformation without a state: `update` from one gradient and its parameter."""
    return GradientTransformation(
        lambda params: EmptyState(),
        lambda updates, state, *, params, inplace: (
            {name: update(u, params[name]) for name, u in updates.items()},
            state,
        ),
    )


def averaged(update) -> GradientTransformation:
    """A user's transformation with a running mean, made by `update` from the old one and the gradient."""

    def step(updates, state, *, params, inplace):
        mean = {name: update(state[name], u) for name, u in updates.items()}
        return {name: -0.1 * m for name, m in mean.items()}, mean

    return GradientTransformation(lambda params: {name: torch.zeros_like(p) for name, p in params.items()}, step)


IMPURE = {
    "momentum": lambda: torchopt.sgd(0.1, momentum=0.9),
    "dampened momentum": lambda: torchopt.sgd(0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda: torchopt.sgd(0.1, momentum=0.9, nesterov=True),
    "rmsprop with momentum": lambda: torchopt.rmsprop(1e-3, momentum=0.9, initial_scale=0.1),
    "noise": lambda: written(lambda u, p: u + torch.randn(u.shape, generator=GENERATOR)),
    "a gradient in place": lambda: written(lambda u, p: u.mul_(-0.1)),
    "parameters in place": lambda: written(lambda u, p: -0.1 * u + 0 * p.add_(u)),
    "a mean in place": lambda: averaged(lambda mean, u: mean.mul_(0.9).add_(u)),
}
CUT = {
    "clip": torchopt.clip_grad_norm(1.0),
    "a high clip in a chain": torchopt.chain(torchopt.clip_grad_norm(1e4), mg.optim.adam(1e-3)),
    "accelerated adam": torchopt.adam(1e-3, eps_root=1e-2, use_accelerated_op=True),
    "accelerated adam with a small root": torchopt.adam(1e-3, eps_root=1e-8, use_accelerated_op=True),
    "a norm as a number": written(lambda u, p: -0.1 * u / (1 + float(torch.linalg.vector_norm(u.detach())))),
    "a decay outside the graph": written(lambda u, p: -0.1 * u - 0.01 * p.detach()),
    "a memory outside the graph": averaged(lambda mean, u: 0.9 * mean.detach() + u),
    "a gradient outside the graph": averaged(lambda mean, u: 0.9 * mean + u.detach()),
}
# Of another spread of sizes, one of them a vector of zeros, as biases are.
PARAMS = {"w": torch.linspace(-1, 2, 6).reshape(2, 3), "b": torch.zeros(3), "scale": torch.tensor(30.0)}
GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transformation", GOOD.values(), ids=GOOD.keys())
def test_good_ones_are_taken_in(transformation, dtype):
    params = {name: value.to(dtype) for name, value in PARAMS.items()}
    ours, theirs = mg.optim.adapt(transformation).init(params), transformation.init(params)
    assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))


def tensors(state) -> list[Tensor]:
    return [leaf for leaf in torchopt.pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("transformation", ROOTS.values(), ids=ROOTS.keys())
def test_a_root_without_a_derivative_at_zero_is_warned_of(transformation):
    with pytest.warns(UserWarning, match="not finite where a gradient entry is exactly 0.*eps_root=1e-8"):
        mg.optim.adapt(transformation).init(PARAMS)


@pytest.mark.parametrize("build", IMPURE.values(), ids=IMPURE.keys())
def test_what_remembers_or_changes_its_inputs_is_refused(build):
    with pytest.raises(ValueError, match=r"not pure: (its update changes|the same update made twice differs by \d)"):
        mg.optim.adapt(build()).init(PARAMS)
    assert torch.equal(PARAMS["w"].flatten(), torch.linspace(-1, 2, 6))


@pytest.mark.parametrize("transformation", CUT.values(), ids=CUT.keys())
def test_what_cuts_the_graph_is_refused(transformation):
    with pytest.raises(ValueError, match=r"not differentiable: .* differs from central differences by [\d.e+-]+ %"):
        mg.optim.adapt(transformation).init(PARAMS)


MANY = {f"w{number}": torch.ones(32, 32) for number in range(100)}


def test_a_rank_one_error_is_seen_among_many_parameters():
    """A norm outside the graph is one direction of 100 000: no random direction would show it."""
    with pytest.raises(ValueError, match=r"by (9\d|1\d\d)\S* %"):
        mg.optim.adapt(torchopt.clip_grad_norm(1.0)).init(MANY)


def test_kinks_are_not_taken_for_cuts():
    """A clamp and a maximum have no derivative in places; among many entries some are near them."""
    mg.optim.adapt(written(lambda u, p: -u.clamp(-1e-3, 1e-3))).init(MANY)
    mg.optim.adapt(torchopt.adamax(1e-3)).init(MANY)


@pytest.mark.parametrize("shape", [(40,), (3, 50), (40, 2, 60)])
def test_a_large_parameter_is_tried_in_part_unless_the_transformation_needs_all_of_it(shape):
    sizes, rates, params = [], torch.linspace(0.1, 0.2, shape[-1]), {"w": torch.ones(shape)}

    def noted(u: Tensor, p: Tensor) -> Tensor:
        sizes.append(u.shape)
        return -0.1 * u

    mg.optim.adapt(written(noted)).init(params)
    assert set(sizes) == {tuple(min(size, 32) for size in shape)}
    mg.optim.adapt(written(lambda u, p: -rates * u)).init(params)
    with pytest.raises(ValueError, match="not differentiable"):
        mg.optim.adapt(written(lambda u, p: -rates * u.detach())).init(params)


def test_the_step_adapts_what_it_is_given_and_asks_for_the_proof_once():
    problem, num_updates = PROBLEMS["mlp"](3), []

    def update(updates, state, *, params, inplace):
        assert not inplace
        num_updates.append(1)
        return {name: -0.1 * u for name, u in updates.items()}, state

    step = problem.step(lambda meta: GradientTransformation(lambda params: (), update))
    state = step.init(problem.params, problem.meta)
    in_proof = len(num_updates)
    assert in_proof == 36
    for batch in problem.batches:
        state = step(state, batch, problem.meta)
    assert len(num_updates) == in_proof + 3


def test_the_step_refuses_as_well():
    problem = PROBLEMS["mlp"](2)
    for wrong in (torchopt.clip_grad_norm(0.1), lambda meta: torchopt.chain(torchopt.clip_grad_norm(0.1))):
        with pytest.raises(ValueError, match="not differentiable"):
            mg.train(problem.step(wrong), problem.params, problem.batches, problem.meta)


def test_ours_need_no_proof():
    ours = mg.optim.adam(1e-3)
    assert mg.optim.adapt(ours) is ours
    adapted = mg.optim.adapt(torchopt.adam(1e-3, eps_root=1e-8))
    assert mg.optim.adapt(adapted) is adapted


def test_a_proof_draws_no_number_of_the_caller():
    before = torch.get_rng_state()
    mg.optim.adapt(torchopt.adam(1e-3, eps_root=1e-8)).init(PARAMS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:the derivative of the optimizer is not finite where")
def test_radam_is_exact_on_both_sides_of_its_switch():
    """It divides by its running mean from the sixth step on. No gradient entry is 0 here."""
    arguments = PROBLEMS["mlp"](8).arguments(torchopt.radam(0.02, betas=(0.8, 0.95), eps=1e-3))
    result = mg.metagradient(*arguments, wrt_params=True)
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)


def delayed(updates, state, *, params, inplace):
    """Descent by the gradient before: the state is the change, so both have one cotangent."""
    return state, {name: -0.1 * u for name, u in updates.items()}


def by_means(updates, state, *, params, inplace):
    """The cotangents of the state and of the parameters are one number in every place."""
    changes = {name: -0.1 * u - 0.01 * params[name].mean() for name, u in updates.items()}
    return changes, {name: state[name].mean() + 0 * u for name, u in updates.items()}


@pytest.mark.parametrize("update", [delayed, by_means])
def test_cotangents_that_autograd_makes_of_one_tensor_are_kept_apart(update):
    optimizer = GradientTransformation(
        lambda params: {name: 0.1 * torch.ones_like(p) for name, p in params.items()}, update
    )
    arguments = PROBLEMS["mlp"](5).arguments(optimizer)
    # A metric that reads the state, too.
    arguments = (lambda state: sum(p.square().sum() for p in [*state.params.values(), *state.optimizer.values()]),) + (
        tuple(arguments)[1:]
    )
    result = mg.metagradient(*arguments, wrt_params=True)
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)
