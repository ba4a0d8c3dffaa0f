"""With one step and weights only, no Hessian product is formed, and no second derivative is needed."""

import pytest
import torch
from agreement import relative_error
from torch.autograd.function import once_differentiable

import metagrad as mg


class Cube(torch.autograd.Function):
    """x³ with a backward that cannot itself be differentiated, and a forward-mode derivative."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def arguments(cube, num_steps=1, **options):
    step = mg.TrainStep(mg.weighted(lambda p, b: cube(b["x"] @ p["w"])), mg.optim.adam(0.1, eps_root=1e-2), **options)
    batch = {"x": torch.tensor([[1.0, 0.2, 0.0], [-0.5, 1.0, 0.3], [2.0, 0.1, -1.0]]), "index": torch.tensor([2, 0, 1])}
    meta = {"weights": torch.tensor([1.0, 0.5, 2.0])}
    params = {"w": torch.tensor([0.7, -0.4, 1.1])}
    return lambda state: state.params["w"].square().sum(), step, params, [batch] * num_steps, meta


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"clip_norm": 0.1}])
def test_one_step_works_without_a_second_derivative(options):
    result = mg.metagradient(*arguments(Cube.apply, **options))
    exact = mg.check.unrolled(*arguments(lambda x: x**3, **options))
    assert relative_error(result.meta["weights"], exact.meta["weights"]) <= 1e-13


def test_the_initial_parameters_need_one():
    """torch leaves a once-differentiable gradient without a path to its inputs; that must not read as a zero."""
    with pytest.raises(RuntimeError, match="once_differentiable"):
        mg.metagradient(*arguments(Cube.apply), wrt_params=True)


def test_an_earlier_step_needs_one():
    with pytest.raises(RuntimeError, match="once_differentiable"):
        mg.metagradient(*arguments(Cube.apply, num_steps=2))


@pytest.mark.parametrize("options, evaluations", [({}, 1), ({"microbatch_size": 3}, 2)])
def test_the_loss_is_evaluated_once_for_each_pass(options, evaluations):
    """For the step with the graph of its gradient; with micro-batches, which keep no graph, in forward mode again."""
    calls = []

    def counted(x):
        calls.append(x)
        return x**3

    mg.metagradient(*arguments(counted, **options))
    assert len(calls) == evaluations


class Square(torch.autograd.Function):
    """x² with a differentiable backward, and no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_without_forward_mode_a_second_backward_takes_its_place_and_says_so():
    with pytest.warns(UserWarning, match="forward mode does not work for this loss.*second backward pass"):
        result = mg.metagradient(*arguments(Square.apply, microbatch_size=2))
    exact = mg.check.unrolled(*arguments(lambda x: x**2))
    assert relative_error(result.meta["weights"], exact.meta["weights"]) <= 1e-13
