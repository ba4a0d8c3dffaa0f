"""Contract 4: a number that is not finite stops the run and is named; nothing is invented in its place."""

import pytest
import torch

import metagrad as mg


def logarithms(values, optimizer=None, **options):
    """Training on log(w x): NaN where x < 0, infinite where x = 0."""
    step = mg.TrainStep(lambda p, b, meta: torch.log(p["w"] * b), optimizer or mg.optim.sgd(0.1), **options)
    batches = [torch.tensor([1.0, value]) for value in values]
    return step, {"w": torch.tensor(1.0)}, batches, {"lr": torch.tensor(1.0)}


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 1}])
def test_a_nan_loss_names_its_step(options):
    arguments = logarithms([1.0, 2.0, -1.0], **options)
    with pytest.raises(mg.NonFiniteError, match=r"loss is not finite at step 2: 1 NaN and 0 infinite"):
        mg.metagradient(lambda s: s.params["w"] * 1, *arguments)
    with pytest.raises(mg.NonFiniteError, match="at step 2"):
        mg.train(*arguments)


def test_an_infinite_loss_names_its_step():
    with pytest.raises(mg.NonFiniteError, match=r"at step 1: 0 NaN and 1 infinite of 2 values"):
        mg.metagradient(lambda s: s.params["w"] * 1, *logarithms([1.0, 0.0]))


def test_a_metric_that_is_not_finite_says_so():
    with pytest.raises(mg.NonFiniteError, match="metric is nan after 1 steps"):
        mg.metagradient(lambda s: torch.log(-s.params["w"]), *logarithms([1.0]))


def flat_quadratic(num_steps):
    """θ²x/2 at θ = 0: every gradient is exactly 0, so Adam stays there, but its derivative is −lr/√eps_root."""
    optimizer = mg.optim.adam(1.0, betas=(0.0, 0.0), eps=1e-300, eps_root=1e-300)
    step = mg.TrainStep(mg.weighted(lambda p, b: p["theta"] ** 2 * b["x"] / 2), optimizer)
    batch = {"x": torch.ones(1), "index": torch.zeros(1, dtype=torch.long)}
    return step, {"theta": torch.tensor(0.0)}, [batch] * num_steps, {"weights": torch.ones(1)}


def test_an_overflow_of_the_cotangent_names_step_and_tensor():
    # Each step back multiplies the cotangent by 1e150: 1e150 at step 3, 1e300 at step 2, too much at step 1.
    with pytest.raises(mg.NonFiniteError, match=r"not finite at step 1 in state\.params\['theta'\].*eps_root"):
        mg.metagradient(lambda s: s.params["theta"] * 1, *flat_quadratic(4))


def test_a_metaparameter_that_overflows_is_named():
    # One step fewer: the first step needs no cotangent of its own state, only that of the weights: inf · 0.
    with pytest.raises(mg.NonFiniteError, match=r"cotangent is not finite at step 0 in meta\['weights'\]\."):
        mg.metagradient(lambda s: s.params["theta"] * 1, *flat_quadratic(3))


def test_a_cotangent_that_fits_is_returned():
    result = mg.metagradient(lambda s: s.params["theta"] * 1, *flat_quadratic(2), wrt_params=True)
    assert float(result.params["theta"]) == pytest.approx(1e300, rel=1e-9)


def test_an_unused_parameter_is_no_reason_for_nan():
    """Exactly zero gradients at every step, which eps_root = 0 would turn into NaN."""
    step = mg.TrainStep(lambda p, b, meta: (p["w"] - b) ** 2, mg.optim.adam(0.1))
    params = {"w": torch.tensor(0.3), "idle": torch.tensor([1.0, 2.0])}
    result = mg.metagradient(
        lambda s: s.params["w"] + 3 * s.params["idle"].sum(), step, params, [torch.ones(2)] * 3, {}, wrt_params=True
    )
    assert torch.equal(result.params["idle"], torch.full((2,), 3.0))
