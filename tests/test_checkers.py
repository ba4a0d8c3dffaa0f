"""The referees themselves: they know closed forms, pass what is right, and find what is wrong."""

from dataclasses import dataclass

import pytest
import torch
from optimizers import OPTIMIZERS
from problems import PROBLEMS
from quadratic import LR, quadratic

import metagrad as mg
from metagrad.check._slope import slope


def frozen_target(p, b, meta):
    return (p["theta"] - meta["target"].detach()) ** 2


# Finite differences.


def test_differences_know_a_closed_form_and_their_own_error():
    # θ_T = b + (θ₀ − b)(1 − 2 lr)^T
    arguments = quadratic(num_steps=4)
    found = mg.check.finite_differences(*arguments, wrt_params=True, num_directions=5)
    shrink = (1 - 2 * LR) ** 4
    by_lr, by_target, by_start = (0.5 - 2.0) * 4 * (1 - 2 * LR) ** 3 * -2, 1 - shrink, shrink
    for meta, params, derivative, error in zip(*found[:4], strict=True):
        wanted = by_lr * meta["lr"] + by_target * meta["target"] + by_start * params["theta"]
        assert (derivative - wanted).abs() <= error <= 1e-9
    report = found.compare(mg.metagradient(*arguments, wrt_params=True))
    assert report.verdict == "agree" and all(row.verdict == "agree" for row in report.rows)
    assert "Verdict: agree" in str(report) and len(str(found).splitlines()) == 6


def test_a_hidden_derivative_disagrees():
    arguments = quadratic(num_steps=3, loss=frozen_target)
    report = mg.check.finite_differences(*arguments).compare(mg.metagradient(*arguments))
    assert report.verdict == "disagree"
    assert "step_adjoint tells where" in str(report)


def test_a_derivative_of_zero_is_no_division_by_zero():
    metric, step, params, batches, meta = quadratic(loss=lambda p, b, meta: (p["theta"] - 1) ** 2)
    run = metric, step, params, batches, {"lr": meta["lr"] * 0, "unused": meta["target"]}
    differences = mg.check.finite_differences(metric, mg.TrainStep(step.loss, mg.optim.sgd(LR)), *run[2:])
    result = mg.metagradient(metric, mg.TrainStep(step.loss, mg.optim.sgd(LR)), *run[2:])
    assert torch.equal(differences.derivatives, torch.zeros(3))
    assert torch.equal(differences.relative_error(result), torch.zeros(3))
    assert {row.verdict for row in differences.compare(result).rows} == {"agree"}
    wrong = result._replace(meta={"lr": torch.tensor(1e-3), "unused": torch.tensor(0.0)})
    assert differences.compare(wrong).verdict == "disagree"
    assert differences.relative_error(wrong).isinf().all()


def test_float32_differences_cannot_tell_rather_than_accuse():
    """The derivative is 1e-5 of Φ, which float32 differences at 1e-2 resolve to about 1e-5."""

    def run(dtype):
        metric, *rest = quadratic(dtype=dtype)
        return (lambda s: 1e4 + metric(s), *rest)

    single, double = run(torch.float32), run(torch.float64)
    report = mg.check.finite_differences(*single).compare(mg.metagradient(*single))
    assert report.verdict == "cannot tell" and "float64" in str(report)
    assert mg.check.finite_differences(*double).compare(mg.metagradient(*double)).verdict == "agree"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_error_bars_cover_the_error(optimizer, dtype):
    problem = PROBLEMS["mlp"](5)
    move = lambda tree: {name: value.to(dtype) if value.is_floating_point() else value for name, value in tree.items()}  # noqa: E731  # one line, used thrice
    step = problem.step(OPTIMIZERS[optimizer])
    held_out = problem.batches[0]
    arguments = (
        lambda state: problem.loss(state.params, move(held_out)).mean(),
        step,
        move(problem.params),
        [move(batch) for batch in problem.batches],
        move(problem.meta),
    )
    exact = mg.check.unrolled(*arguments)
    found = mg.check.finite_differences(*arguments, num_directions=8).compare(exact)
    assert all(abs(row.value - row.difference) <= 3 * row.error for row in found.rows)
    assert found.verdict != "disagree"
    # An error bar that covers everything would prove nothing.
    assert all(row.error <= (0.1 if dtype == torch.float32 else 1e-6) for row in found.rows)


def test_a_metaparameter_at_the_end_of_its_range_asks_for_a_smaller_step():
    problem = PROBLEMS["mlp"](2)
    step = mg.TrainStep(
        lambda p, b, meta: problem.loss(p, b), lambda meta: mg.optim.adam(0.1, (0.9, meta["beta2"]), eps_root=1e-3)
    )
    arguments = problem.metric, step, problem.params, problem.batches, {"beta2": torch.tensor(0.999)}
    with pytest.raises(mg.NonFiniteError, match=r"moved by 1e\+00 of its size.*smaller `step_size`"):
        mg.check.finite_differences(*arguments, step_size=1.0)
    assert (
        mg.check.finite_differences(*arguments, step_size=1e-5).relative_error(mg.metagradient(*arguments)).max() < 1e-5
    )


# Unrolled autograd.


def test_several_metrics_are_unrolled_one_by_one():
    problem = PROBLEMS["mlp"](3)
    _, *rest = problem.arguments(OPTIMIZERS["adam"])
    metrics = [problem.metric, lambda state: state.params["b"].square().sum()]
    both = mg.check.unrolled(metrics, *rest, wrt_params=True)
    assert both.value.shape == (2,) and both.meta["weights"].shape == (2, 7) and both.params["a"].shape == (2, 3, 4)
    for number, metric in enumerate(metrics):
        alone = mg.check.unrolled(metric, *rest, wrt_params=True)
        assert torch.equal(both.value[number], alone.value)
        for name, gradient in alone.params.items():
            torch.testing.assert_close(both.params[name][number], gradient, rtol=1e-14, atol=1e-16)
        torch.testing.assert_close(both.meta["weights"][number], alone.meta["weights"], rtol=1e-14, atol=1e-16)


# Determinism: what it must find is in test_steps_are_pure.py; here trees that differ in structure.


def test_determinism_reports_what_it_compared():
    _, *rest = PROBLEMS["mlp"](3).arguments(OPTIMIZERS["sgd"])
    found = mg.check.determinism(*rest)
    assert found.num_steps == 3 and found.num_tensors == 5  # three parameters, the step count, one generator
    assert str(found).startswith("Verdict: deterministic: each of 3 steps")


@dataclass
class Growing:
    """A plain step whose optimizer state grows by an entry at every second call."""

    calls: int = 0

    def init(self, params, meta):
        return mg.State(params, {}, {}, (), 0)

    def __call__(self, state, batch, meta):
        self.calls += 1
        return state._replace(optimizer={"cache": torch.ones(2)} if self.calls % 2 else {})


def test_states_of_another_structure_are_named():
    with pytest.raises(ValueError, match=r"the state after Growing .* adds \.optimizer\['cache'\]"):
        mg.check.determinism(Growing(), {"w": torch.ones(1)}, [None], {})


def test_a_key_added_to_the_batch_is_named():
    def loss(p, b, meta):
        b["seen"] = torch.ones(1)
        return p["w"] ** 2 * b["x"]

    step = mg.TrainStep(loss, mg.optim.sgd(LR))
    with pytest.raises(mg.ReplayMismatchError, match=r"at step 0, batch\['seen'\].*changed in place"):
        mg.check.determinism(step, {"w": torch.tensor(1.0)}, [{"x": torch.ones(2)}], {})


def test_a_number_in_a_batch_is_compared_too():
    class Counting:
        readings = 0

        def __len__(self):
            return 1

        def __getitem__(self, step):
            self.readings += 1
            return {"x": torch.ones(2), "scale": float(self.readings)}

    step = mg.TrainStep(lambda p, b, meta: p["w"] ** 2 * b["x"], mg.optim.sgd(LR))
    with pytest.raises(mg.ReplayMismatchError, match=r"batch\['scale'\] changed between two readings.*3\.0 and 2\.0"):
        mg.check.determinism(step, {"w": torch.tensor(1.0)}, Counting(), {})


# The error bar of a slope, on functions whose derivative and noise are known.


def at(function):
    return lambda h: function(torch.tensor(h))


@pytest.mark.parametrize("noise", [1e-12, 1e-8, 1e-4])
def test_the_noise_of_a_function_is_measured(noise):
    """sin(1 + h) with normal noise of a known size; the rounding floor is 0, so nothing but the values tells."""
    generator = torch.Generator().manual_seed(0)
    function = at(lambda h: torch.sin(1 + h) + noise * torch.randn((), generator=generator))
    found = [slope(function, function(0.0), 0.1, 6, rounding=0.0) for _ in range(400)]
    gaps = torch.stack([(each.derivative - torch.cos(torch.tensor(1.0))).abs() for each in found])
    errors = torch.stack([each.error for each in found])
    # Three error bars are what a verdict allows; a normal error in units of a known deviation exceeds three at 0.3 %.
    assert (gaps > 3 * errors).double().mean() <= 0.01
    assert (gaps > errors).double().mean() <= 0.32
    # Not because they are wide: at the smallest h, 0.1 / 2⁵, noise / h is 320 noise, and residuals are up to 3 noise.
    assert errors.median() <= 1000 * noise


def test_a_jump_away_from_the_point_costs_only_the_coarse_steps():
    function = at(lambda h: torch.exp(h) + torch.where(h > 0.03, 1.0, 0.0))
    found = slope(function, function(0.0), 0.1, 6, rounding=1e-16)
    assert (found.derivative - 1).abs() <= found.error <= 1e-7


def test_a_jump_at_the_point_is_no_derivative():
    function = at(lambda h: torch.where(h > 1e-9, 1.0, 0.0) + h)
    found = slope(function, function(0.0), 0.1, 6, rounding=1e-16)
    assert found.error > 1
