"""Rewards against retraining by hand, statistics against scipy, and both gradients against every ordered data set."""

import json
import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from dpg_problems import TEXTS, parameters, target, text_loss, tiny_run
from typer.testing import CliRunner

import dpg.agreement
import dpg.enumeration
import metagrad as mg
from dpg import cli
from dpg.agreement import agreement
from dpg.enumeration import Problem, compared, enumeration, gradients
from dpg.enumeration_page import Point, exponents
from dpg.fidelity import Trial, fidelity
from dpg.fidelity_page import summary
from dpg.folder import RunFolderError
from dpg.reward import MetagradReward

LR = 0.5
SMALL_STUDY = {"num_texts": 8, "num_left_out": 3, "num_changes": 3, "inner_steps": (2,), "lr_factors": (1.0,)}


def curved(params):
    """A metric that is not linear in the parameters."""
    return -(params["lm_head.weight"] - 0.1).square().sum()


def straight(params):
    """A metric that is."""
    return params["lm_head.weight"].flatten() @ torch.arange(96.0).cos()


def trial(metric, *, inner_batch_size=3):
    return Trial(MetagradReward(target(mg.optim.sgd(lr=LR), inner_batch_size=inner_batch_size), metric), TEXTS, seed=0)


def phi_by_hand(chosen, weights, metric):
    """Φ after gradient descent with a weight on every text, each text's loss computed alone."""
    params = parameters(chosen.model)
    for batch in chosen.batches(TEXTS):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        indices = batch["index"].tolist()
        loss = sum(float(weights[i]) * text_loss(chosen.model, TEXTS[i], 6, 6, leaves) for i in indices) / len(indices)
        steps = torch.autograd.grad(loss, list(leaves.values()))
        params = {name: p - LR * g for (name, p), g in zip(params.items(), steps, strict=True)}
    return float(metric(params))


def test_a_text_left_out_is_the_run_without_it():
    found = trial(curved)
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0)).tolist()
    whole = phi_by_hand(found.reward.target, [1.0] * 7, curved)
    wanted = [whole - phi_by_hand(found.reward.target, [float(j != i) for j in range(7)], curved) for i in order]
    left_out = found.left_out(7)
    # Φ is about 10 and is computed twice: differences are right to 1e-14.
    torch.testing.assert_close(left_out.true, torch.tensor(wanted), rtol=0, atol=1e-12)
    assert torch.equal(left_out.predicted, found.reward(TEXTS)[order])
    target, query = found.reward.target, [lambda state: curved(state.params)]
    retrained = mg.attribution.retrain(
        query, target.step, target.model, target.batches(TEXTS), torch.eye(7, dtype=torch.bool)[order]
    )
    torch.testing.assert_close(found.scores.phi - retrained[0], left_out.true, rtol=0, atol=1e-12)


def test_changed_weights_are_the_run_at_those_weights():
    found = trial(curved)
    changes = 0.3 * torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = phi_by_hand(found.reward.target, [1.0] * 7, curved)
    wanted = [phi_by_hand(found.reward.target, 1 + row, curved) - whole for row in changes]
    changed = found.changed(4, 0.3)
    torch.testing.assert_close(changed.true, torch.tensor(wanted), rtol=0, atol=1e-12)
    rewards = found.reward(TEXTS)
    torch.testing.assert_close(changed.predicted, (changes * rewards).sum(1), rtol=1e-13, atol=1e-15)


def test_what_is_linear_is_predicted_exactly():
    found = trial(straight, inner_batch_size=7)  # One step of gradient descent is linear in the weights.
    for each in (found.left_out(7), found.changed(5, 0.5)):
        torch.testing.assert_close(each.predicted, each.true, rtol=1e-10, atol=1e-12)
        assert each.slope.value == pytest.approx(1, abs=1e-10)
        assert each.pearson.lower == pytest.approx(1, abs=1e-10)
    assert found.smoothness(0.1).value == pytest.approx(1, abs=1e-12)


def test_a_metric_that_is_not_a_number_is_raised():
    found = trial(lambda params: params["lm_head.weight"].square().sum().exp())
    assert math.isfinite(found.scores.phi)
    with pytest.raises(mg.NonFiniteError, match="the metric is inf after training at other weights"):
        found.phi_at(torch.full((7,), 100.0))


def test_statistics_are_those_of_scipy(monkeypatch):
    monkeypatch.setattr(dpg.agreement, "NUM_RESAMPLES", 40)
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(9, generator=generator).round(decimals=1)  # some ties
    right = 0.7 * left + 0.3 * torch.randn(9, generator=generator)
    found = agreement(left, right, phi=1.0, seed=5)
    rows = torch.randint(9, (40, 9), generator=torch.Generator().manual_seed(5)).numpy()
    x, y = left.numpy(), right.numpy()
    statistics = {
        "pearson": lambda a, b: scipy.stats.pearsonr(a, b).statistic,
        "spearman": lambda a, b: scipy.stats.spearmanr(a, b).statistic,
        "slope": lambda a, b: np.linalg.lstsq(a[:, None], b, rcond=None)[0][0],
    }
    for name, statistic in statistics.items():
        samples = [statistic(x[row], y[row]) for row in rows]
        wanted = [statistic(x, y), *np.quantile(samples, [0.025, 0.975])]
        assert list(getattr(found, name)) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("still", ["predicted", "true"])
def test_nothing_is_made_of_what_does_not_vary(still):
    values = {"predicted": torch.arange(4.0), "true": torch.arange(4.0)}
    values[still] = 5 + 1e-13 * torch.arange(4.0)  # rounding, where Φ is 1
    found = agreement(**values, phi=1.0)
    assert (found.pearson, found.spearman, found.slope) == (None, None, None)
    # Bootstrap samples that happen to be constant are left out, not NaN.
    rare = agreement(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 2.0]), phi=1.0)
    assert rare.slope == (2.0, 2.0, 2.0)


def test_a_study_of_a_run(tmp_path):
    path = tiny_run(tmp_path)
    cells = fidelity(path, **SMALL_STUDY)
    assert [(cell.step, cell.inner_steps, cell.lr) for cell in cells] == [(0, 2, 1e-4), (2, 2, 1e-4)]
    written = (path / "fidelity.json").read_bytes()
    assert json.loads(written)["cells"][1]["left_out"]["true"] == cells[1].left_out.true.tolist()
    page = (path / "fidelity.md").read_text()
    assert str(cells[0].left_out.pearson) in page and summary(cells) in page and "nan" not in page
    assert (path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    options = ["--texts", "8", "--left-out", "3", "--changes", "3", "--inner-steps", "2", "--lr-factors", "1"]
    done = CliRunner().invoke(cli.app, ["fidelity", str(path), *options])
    assert done.exit_code == 0 and summary(cells) in done.output
    assert (path / "fidelity.json").read_bytes() == written

    with pytest.raises(RunFolderError, match="holds 8 texts, not 16"):
        fidelity(path, **{**SMALL_STUDY, "num_texts": 16})
    (path / "validation" / "step-000002.jsonl").unlink()
    with pytest.raises(RunFolderError, match="the texts of 1 validations, and at least two are needed"):
        fidelity(path, **SMALL_STUDY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_steps": (3,)}, r"8 texts in \(3,\) inner steps"),
        ({"inner_steps": (), "lr_factors": ()}, r"8 texts in \(\) inner steps"),
        ({"lr_factors": (0.0,)}, "all be above 0"),
        ({"spread": -1.0}, "a spread of -1.0"),
        ({"num_left_out": 9}, "9 of 8 texts left out"),
        ({"num_changes": 2}, "2 changes: a correlation needs at least three"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        fidelity(tmp_path, **{**SMALL_STUDY, **change})


TWO_KINDS = Problem.random(3, kinds=2, vocabulary=3, length=4)
ADAM = {"lr": 0.4, "betas": (0.8, 0.9), "eps": 1e-6, "eps_root": 1e-2}
OPTIMIZERS = {"sgd": mg.optim.sgd(lr=0.7), "adam": mg.optim.adam(**ADAM)}


def trained_by_hand(problem, name, data_set, weights, num_steps):
    """Φ after training on one ordered data set, in torch operations that keep the graph of `weights`."""
    w, size = problem.start, len(data_set) // num_steps
    mean = square = torch.zeros_like(w)
    for step in range(1, num_steps + 1):
        loss, at = 0.0, w.detach().requires_grad_() if not w.requires_grad else w
        for i in range((step - 1) * size, step * size):
            tokens = problem.texts[data_set[i]].tolist()
            pairs = list(zip(tokens, tokens[1:], strict=False))
            text = sum(torch.logsumexp(at[a], 0) - at[a, b] for a, b in pairs) / len(pairs)
            loss = loss + weights[i] * text / size
        g = torch.autograd.grad(loss, at, create_graph=True)[0]
        if name == "sgd":
            w = w - 0.7 * g
            continue
        (b1, b2), lr = ADAM["betas"], ADAM["lr"]
        mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g * g
        w = w - lr * mean / (1 - b1**step) / ((square / (1 - b2**step) + ADAM["eps_root"]).sqrt() + ADAM["eps"])
    tokens = problem.held_out[0].tolist()
    pairs = list(zip(tokens, tokens[1:], strict=False))
    return -sum(torch.logsumexp(w[a], 0) - w[a, b] for a, b in pairs) / len(pairs)


def brute_force(problem, name, num_texts, num_steps):
    """J as a function of θ with its graph, and the DPG gradient: every one of the K^n ordered data sets."""
    logits = problem.logits.clone().requires_grad_()
    objective, dpg = 0.0, torch.zeros_like(logits)
    for data_set in product(range(len(logits)), repeat=num_texts):
        weights = torch.ones(num_texts, requires_grad=True)
        phi = trained_by_hand(problem, name, data_set, weights, num_steps)
        rewards = torch.autograd.grad(phi, weights)[0]
        log_probs = logits.log_softmax(0)[list(data_set)]
        objective = objective + log_probs.sum().exp() * phi.detach()
        surrogate = (rewards * log_probs).sum()
        dpg += log_probs.sum().exp().detach() * torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    return float(objective.detach()), torch.autograd.grad(objective, logits)[0], dpg


@pytest.mark.parametrize(("num_texts", "num_steps"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multisets_stand_for_all_ordered_data_sets(name, num_texts, num_steps):
    found = gradients(TWO_KINDS, OPTIMIZERS[name], num_texts, num_steps)
    objective, true, dpg = brute_force(TWO_KINDS, name, num_texts, num_steps)
    assert found.objective == pytest.approx(objective, rel=1e-13)
    # Gradients are about 1e-2 and sums of terms of 1.
    torch.testing.assert_close(found.true, true, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(found.dpg, dpg, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_true_gradient_is_a_finite_difference_of_the_objective(name):
    found, h, differences = gradients(TWO_KINDS, OPTIMIZERS[name], 3), 1e-2, []
    for direction in torch.eye(2):
        ends = {}
        for k in (-2, -1, 1, 2):
            moved = Problem(TWO_KINDS.logits + k * h * direction, TWO_KINDS.texts, TWO_KINDS.held_out, TWO_KINDS.start)
            ends[k] = gradients(moved, OPTIMIZERS[name], 3).objective
        differences.append((ends[-2] - 8 * ends[-1] + 8 * ends[1] - ends[2]) / (12 * h))
    # Fourth order: J⁽⁵⁾h⁴/30 is 1e-10, of gradients of 1e-2.
    torch.testing.assert_close(found.true, torch.tensor(differences), rtol=1e-6, atol=1e-10)


def test_the_error_falls_like_lr_over_n_for_gradient_descent():
    problem = Problem.random()
    points = [
        Point("SGD", 1, lr, n, *compared(gradients(problem, mg.optim.sgd(lr=lr), n)))
        for lr in (0.03, 0.1, 0.3)
        for n in (1, 2, 4)
    ]
    for lr in (0.03, 0.1, 0.3):
        one, two, four = [point.error for point in points if point.lr == lr]
        assert 1.6 <= one / two <= 2.4 and 1.6 <= two / four <= 2.4
    found = exponents(points)
    assert found.lr == pytest.approx(1, abs=0.05) and found.num_texts == pytest.approx(-1, abs=0.05)


def test_exponents_are_found_where_steps_are_small():
    law = [Point("SGD", 1, lr, n, 1.0, 1.0, 0.01 * lr**0.7 / n**1.3) for lr in (0.01, 0.03, 0.1) for n in (1, 2, 4)]
    wild = [Point("SGD", 1, 1000.0, n, 0.1, 1.0, 5.0) for n in (1, 2)]
    assert exponents(law + wild) == pytest.approx((0.7, -1.3, 9), rel=1e-10)
    assert exponents(wild) is None
    assert exponents([point for point in law if point.lr == 0.1]) is None  # nothing says how it depends on lr


def test_an_objective_that_does_not_depend_on_the_policy_has_no_error():
    same = Problem(TWO_KINDS.logits, TWO_KINDS.texts[[0, 0]], TWO_KINDS.held_out, TWO_KINDS.start)
    found = gradients(same, OPTIMIZERS["sgd"], 2)
    zero = found._replace(true=torch.zeros(2))
    assert float(found.true.abs().max()) < 1e-15
    with pytest.raises(ValueError, match="a gradient is 0"):
        compared(zero)


def test_texts_that_do_not_fill_their_batches():
    with pytest.raises(ValueError, match="3 texts do not make 2 batches"):
        gradients(TWO_KINDS, OPTIMIZERS["sgd"], 3, 2)


def test_an_enumeration_is_written(tmp_path, monkeypatch):
    points = enumeration(tmp_path, sizes=(1, 2), lrs=(0.1, 1.0))
    assert len(points) == 3 * 2 * (2 + 1)
    assert json.loads((tmp_path / "enumeration.json").read_text()) == [point._asdict() for point in points]
    page = (tmp_path / "enumeration.md").read_text()
    assert f"| SGD | 1 | 0.1 | {points[0].error:.1e} | {points[1].error:.1e} |" in page
    assert (tmp_path / "enumeration.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(dpg.enumeration, "enumeration", lambda path, seed: points)
    done = CliRunner().invoke(cli.app, ["enumerate", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "| Adam, eps_root 1e-3 | 2 |" in done.output
