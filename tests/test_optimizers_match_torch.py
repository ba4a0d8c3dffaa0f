"""Our optimizers are those of torch, step for step, and remember nothing outside their state."""

import numpy as np
import pytest
import torch
import torchopt
from agreement import relative_error
from optimizers import BUILDERS, TWINS, Twins
from problems import PROBLEMS
from torch.nn.utils import clip_grad_norm_

import metagrad as mg


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS.keys())
def test_training_is_that_of_torch(twins: Twins, clip_norm):
    problem = PROBLEMS["mlp"](7)
    theirs = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    optimizer = twins.torch(list(theirs.values()))
    for batch in problem.batches:
        for value in theirs.values():
            value.grad = None
        (problem.meta["weights"][batch["index"]] * problem.loss(theirs, batch)).mean().backward()
        if clip_norm is not None:
            assert clip_grad_norm_(theirs.values(), clip_norm) > clip_norm
        optimizer.step()
    ours = mg.train(problem.step(twins.ours, clip_norm=clip_norm), problem.params, problem.batches, problem.meta).params
    for name, wanted in theirs.items():
        assert relative_error(ours[name], wanted) <= twins.rtol


@pytest.mark.parametrize("decay, decoupled", [(0.0, False), (0.3, False), (0.3, True)])
def test_adam_with_eps_root_is_the_formula(decay, decoupled):
    """The mean over a batch of (θ − x)²/2 has the gradient θ − mean(x), so Adam can be written in numpy."""
    batches = [torch.tensor([[1.0, -2.0], [0.5, 0.0]]) * (t + 1) for t in range(6)]
    theta, m, v = np.array([0.2, 0.7]), np.zeros(2), np.zeros(2)
    for t, batch in enumerate(batches, start=1):
        gradient = theta - batch.numpy().mean(0) + (0 if decoupled else decay * theta)
        m = 0.8 * m + 0.2 * gradient
        v = 0.9 * v + 0.1 * gradient**2
        direction = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t) + 0.05) + 0.01)
        theta = theta - 0.1 * (direction + (decay * theta if decoupled else 0))
    make = mg.optim.adamw if decoupled else mg.optim.adam
    optimizer = make(0.1, betas=(0.8, 0.9), eps=0.01, eps_root=0.05, weight_decay=decay)
    step = mg.TrainStep(lambda p, b, meta: (p["theta"] - b).square().sum(1) / 2, optimizer)
    state = mg.train(step, {"theta": torch.tensor([0.2, 0.7])}, batches, {})
    assert relative_error(state.params["theta"], torch.from_numpy(theta)) <= 1e-14


def test_adam_is_that_of_torchopt():
    problem = PROBLEMS["mlp"](5)
    ours, theirs = (
        mg.metagradient(*problem.arguments(optimizer), wrt_params=True)
        for optimizer in (mg.optim.adam(0.01, eps_root=1e-3), torchopt.adam(0.01, eps_root=1e-3))
    )
    assert relative_error(ours.value, theirs.value) <= 1e-14
    assert relative_error(ours.meta["weights"], theirs.meta["weights"]) <= 1e-12


@pytest.mark.parametrize("name", BUILDERS)
def test_the_state_is_all_there_is_to_remember(name):
    """A new step and a new optimizer at every step, as after a restart, train to the same bits."""

    def rebuilt() -> mg.TrainStep:
        return problem.step(BUILDERS[name]())

    problem = PROBLEMS["mlp"](4)
    once, again = rebuilt(), rebuilt()
    expected = state = once.init(problem.params, problem.meta)
    with torch.no_grad():
        for batch in problem.batches:
            once(expected, batch, problem.meta)  # A call too many must not be remembered either.
            expected = once(expected, batch, problem.meta)
        for batch in problem.batches:
            state = rebuilt()(state, batch, problem.meta)
    again.init(problem.params, problem.meta)
    assert all(torch.equal(state.params[key], expected.params[key]) for key in state.params)


def test_dampening_spares_the_first_step_only():
    # A constant gradient g = 1: v₁ = 1, v₂ = 0.5 + 0.75, v₃ = 0.625 + 0.75.
    step = mg.TrainStep(lambda p, b, meta: p["w"] * b, mg.optim.sgd(1.0, momentum=0.5, dampening=0.25))
    state = mg.train(step, {"w": torch.tensor(0.0)}, [torch.ones(1)] * 3, {})
    assert float(state.params["w"]) == -(1 + 1.25 + 1.375)


def test_clip_leaves_small_gradients_alone():
    gradient = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    clip = mg.optim.clip(10.0)
    kept, _ = clip.update(gradient, clip.init(gradient), inplace=False)
    assert kept == gradient
    clip = mg.optim.clip(2.5)
    halved, _ = clip.update(gradient, clip.init(gradient), inplace=False)
    assert relative_error(halved["b"], torch.tensor([2.0])) <= 1e-6


def test_clip_of_a_zero_gradient_is_zero_with_a_finite_derivative():
    # At w = 0 the loss w²x has gradient 0, and its derivative 2x is passed through unclipped.
    step = mg.TrainStep(lambda p, b, meta: p["w"] ** 2 * b, mg.optim.sgd(0.25), clip_norm=1.0)
    result = mg.metagradient(
        lambda s: s.params["w"] * 3, step, {"w": torch.tensor(0.0)}, [torch.ones(1)], {}, wrt_params=True
    )
    assert float(result.params["w"]) == 3 * (1 - 0.25 * 2)
