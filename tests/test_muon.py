"""Muon is its formula: Newton–Schulz acts on singular values as a polynomial of one number."""

import numpy as np
import pytest
import torch
from agreement import assert_agree, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PROBLEMS

import metagrad as mg


def polar(u: np.ndarray, num_steps: int) -> np.ndarray:
    """What the iteration must give, from the singular value decomposition."""
    left, values, right = np.linalg.svd(u, full_matrices=False)
    values = values / np.linalg.norm(u)
    for _ in range(num_steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


def one_update(gradient: torch.Tensor, **options) -> np.ndarray:
    """The first update at a rate of 1 and without momentum, with the sign of a descent taken away."""
    muon = mg.optim.muon(1.0, momentum=0.0, **options)
    params = {"w": torch.zeros_like(gradient)}
    updates, _ = muon.update({"w": gradient}, muon.init(params), params=params, inplace=False)
    return -updates["w"].numpy()


@settings(max_examples=40)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    num_steps=st.integers(1, 6),
    size=st.sampled_from([1e-5, 1.0, 1e8]),
    seed=st.integers(0, 1000),
)
def test_an_update_is_the_polynomial_of_the_singular_values(rows, columns, num_steps, size, seed):
    gradient = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    wanted = polar(gradient.numpy(), num_steps)
    scaled = one_update(gradient, ns_steps=num_steps)
    np.testing.assert_allclose(scaled, np.sqrt(max(1, rows / columns)) * wanted, rtol=0, atol=1e-12)
    as_adamw = one_update(gradient, ns_steps=num_steps, adjust_lr="match_rms_adamw")
    np.testing.assert_allclose(as_adamw, 0.2 * np.sqrt(max(rows, columns)) * wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
def test_a_run_is_the_formula(shape, nesterov):
    """The loss ½‖θ − x‖², averaged over a batch of x, has the gradient θ − mean(x)."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, *shape, generator=generator) for _ in range(6)]
    start = torch.randn(*shape, generator=generator)
    theta, m, scale = start.numpy(), np.zeros(shape), np.sqrt(max(1, shape[0] / shape[1]))
    for batch in batches:
        g = theta - batch.numpy().mean(0)
        m = 0.8 * m + 0.2 * g
        u = 0.2 * g + 0.8 * m if nesterov else m
        theta = theta - 0.1 * (scale * polar(u, 5) + 0.3 * theta)
    step = mg.TrainStep(
        lambda p, b, meta: (p["w"] - b).square().sum((1, 2)) / 2, mg.optim.muon(0.1, 0.8, nesterov, 0.3)
    )
    trained = mg.train(step, {"w": start}, batches, {}).params["w"]
    assert relative_error(trained, torch.from_numpy(theta)) <= 1e-12


def test_a_matrix_that_is_not_used_stays_with_finite_gradients():
    problem = PROBLEMS["mlp"](3)
    params = {**problem.params, "idle": torch.tensor([[0.3, -0.7], [0.1, 0.2]])}
    step = problem.step(mg.optim.muon(0.05, others=mg.optim.adamw(0.02)))

    def metric(state: mg.State) -> torch.Tensor:
        return problem.metric(state) + state.params["idle"].square().sum()

    arguments = metric, step, params, problem.batches, problem.meta
    result = mg.metagradient(*arguments, wrt_params=True)
    assert torch.equal(result.state.params["idle"], params["idle"])
    assert relative_error(result.params["idle"], 2 * params["idle"]) <= 1e-15
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)


def test_the_rule_decides_which_matrices_are_left_to_the_others():
    params = {"embedding": torch.eye(2), "hidden": torch.eye(2), "bias": torch.ones(2)}
    muon = mg.optim.muon(
        1.0,
        others=mg.optim.sgd(0.5),
        matrices=lambda name, tensor: tensor.ndim == 2 and name != "embedding",
    )
    gradient = {name: 3 * value for name, value in params.items()}
    updates, _ = muon.update(gradient, muon.init(params), params=params, inplace=False)
    assert list(updates) == list(params)
    for name in ("embedding", "bias"):
        assert torch.equal(updates[name], -0.5 * gradient[name])
    np.testing.assert_allclose(updates["hidden"].numpy(), -polar(np.eye(2), 5), rtol=0, atol=1e-14)


def test_the_decay_is_differentiated():
    """The decay alone: at a gradient of 0 the run is θ(1 − lr·decay)ᵀ, and so is its derivative."""
    step = mg.TrainStep(
        lambda p, b, meta: 0.0 * p["w"].sum() * b, lambda meta: mg.optim.muon(0.5, weight_decay=meta["decay"])
    )
    start = torch.tensor([[1.0, -2.0]])
    result = mg.metagradient(
        lambda s: s.params["w"].sum(),
        step,
        {"w": start},
        [torch.ones(1)] * 3,
        {"decay": torch.tensor(0.4)},
        wrt_params=True,
    )
    assert relative_error(result.params["w"], torch.full((1, 2), 0.8**3)) <= 1e-14
    assert relative_error(result.meta["decay"], 3 * 0.8**2 * -0.5 * start.sum()) <= 1e-14
