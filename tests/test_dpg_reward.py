"""The reward of a text is dΦ/dw, compared with retraining at other weights; what cannot be computed is raised."""

import math

import pytest
import torch
from dpg_problems import ADAMW, TEXTS, parameters, same_bits, target, text_loss
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad as mg
from dpg.metrics import WeightPattern
from dpg.reward import MetagradReward

PATTERN = WeightPattern(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]), offset=(1, 2), strength=5.0)
SGD = {"lr": 0.5}
OPTIMIZERS = {"sgd": mg.optim.sgd(**SGD), "adamw": mg.optim.adamw(**ADAMW)}
NUM_STEPS = {1: 7, 3: 3}
"""Inner batch sizes that make so many steps of the seven texts."""


def updated(name, params, gradients, memory, step):
    """The parameters after one update, written out."""
    new = {}
    for key, p in params.items():
        g = gradients[key]
        if name == "sgd":
            new[key] = p - SGD["lr"] * g
            continue
        beta1, beta2 = ADAMW["betas"]
        mean, square = memory.get(key, (torch.zeros_like(p), torch.zeros_like(p)))
        mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g**2
        memory[key] = (mean, square)
        root = (square / (1 - beta2**step) + ADAMW["eps_root"]).sqrt() + ADAMW["eps"]
        new[key] = p - ADAMW["lr"] * (mean / (1 - beta1**step) / root + ADAMW["weight_decay"] * p)
    return new


def phi_after_retraining(name, chosen, weights):
    """Φ of a model trained by hand with a weight on every text, each text's loss computed alone."""
    start, memory = parameters(chosen.model), {}
    params = start
    for step, batch in enumerate(chosen.batches(TEXTS), start=1):
        leaves = {key: p.requires_grad_() for key, p in ((k, p.detach().clone()) for k, p in params.items())}
        indices = batch["index"].tolist()
        loss = sum(weights[i] * text_loss(chosen.model, TEXTS[i], 6, 6, leaves) for i in indices) / len(indices)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        params = {key: p.detach() for key, p in updated(name, params, gradients, memory, step).items()}
    change = params["lm_head.weight"] - start["lm_head.weight"]
    pixels = [(r, c) for r in range(2) for c in range(3)]
    return -sum(math.log1p(math.exp(-5.0 * float(PATTERN.image[r, c] * change[2 + c, 1 + r]))) for r, c in pixels) / 6


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rewards_are_finite_differences_of_retraining(name, num_steps):
    chosen = target(OPTIMIZERS[name], inner_batch_size=NUM_STEPS[num_steps])
    assert len(chosen.batches(TEXTS)) == num_steps
    scores = MetagradReward(chosen, PATTERN).score(TEXTS)
    assert scores.phi == pytest.approx(phi_after_retraining(name, chosen, [1.0] * 7), rel=1e-12)
    # Central differences of fourth order: Φ⁽⁵⁾h⁴/30 and 1e-16/h are 1e-13, and rewards are 1e-2.
    h, differences = 1e-3, []
    for i in range(len(TEXTS)):
        moves = {k: [1.0 + k * h * (j == i) for j in range(7)] for k in (-2, -1, 1, 2)}
        phi = {k: phi_after_retraining(name, chosen, weights) for k, weights in moves.items()}
        differences.append((phi[-2] - 8 * phi[-1] + 8 * phi[1] - phi[2]) / (12 * h))
    wanted = torch.tensor(differences)
    assert float((scores.rewards - wanted).norm() / wanted.norm()) <= 1e-9
    torch.testing.assert_close(scores.rewards, wanted, rtol=1e-6, atol=1e-12)


def test_scores_carry_the_trained_target():
    chosen = target(OPTIMIZERS["adamw"])
    reward = MetagradReward(chosen, PATTERN)
    scores = reward.score(TEXTS)
    assert same_bits(scores.params, chosen.fine_tune(TEXTS))
    assert scores.phi == reward.phi(scores.params)
    assert torch.equal(reward(TEXTS), scores.rewards)


def test_an_empty_text_is_worth_nothing():
    rewards = MetagradReward(target(OPTIMIZERS["adamw"]), PATTERN)([*TEXTS[:4], "", *TEXTS[4:]])
    assert rewards[4] == 0 and torch.count_nonzero(rewards) == 7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inverse_groups_are_trained_apart(name):
    texts = [*TEXTS, "kjih", "aa"]  # three prompts with three texts each
    chosen = target(OPTIMIZERS[name], inner_batch_size=2)
    together = MetagradReward(chosen, PATTERN)
    apart = MetagradReward(chosen, PATTERN, cross_group=False).score(texts, group_size=3)
    wanted, phis = [None] * 9, []
    for member in range(3):
        places = [3 * prompt + member for prompt in range(3)]
        scores = together.score([texts[place] for place in places])
        phis.append(scores.phi)
        for place, value in zip(places, scores.rewards.tolist(), strict=True):
            wanted[place] = value
    assert apart.rewards.tolist() == wanted
    assert apart.phi == pytest.approx(sum(phis) / 3, rel=1e-15)
    assert not torch.allclose(apart.rewards, together(texts), rtol=1e-3)


@pytest.mark.parametrize("group_size", [None, 2, 4])
def test_texts_that_do_not_fill_their_groups(group_size):
    reward = MetagradReward(target(OPTIMIZERS["sgd"]), PATTERN, cross_group=False)
    with pytest.raises(ValueError, match=f"7 texts must come in whole groups; `group_size` is {group_size}"):
        reward(TEXTS, group_size)


def test_no_texts():
    with pytest.raises(ValueError, match="at least one string"):
        MetagradReward(target(OPTIMIZERS["sgd"]), PATTERN)([])


@settings(max_examples=15)
@given(st.permutations(range(len(TEXTS))))
def test_rewards_follow_the_order_of_the_texts(order):
    reward = MetagradReward(target(OPTIMIZERS["adamw"], inner_batch_size=len(TEXTS)), PATTERN)
    torch.testing.assert_close(reward([TEXTS[i] for i in order]), reward(TEXTS)[list(order)], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_micro_batches_change_no_reward(microbatch_size, num_steps):
    size = NUM_STEPS[num_steps]
    whole = MetagradReward(target(OPTIMIZERS["adamw"], inner_batch_size=size), PATTERN)
    cut = MetagradReward(target(OPTIMIZERS["adamw"], inner_batch_size=size, microbatch_size=microbatch_size), PATTERN)
    torch.testing.assert_close(cut(TEXTS), whole(TEXTS), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("together", [1, 2, 3, 100])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_texts_in_one_forward_pass_change_no_reward(together, num_steps, monkeypatch):
    chosen = target(OPTIMIZERS["adamw"], inner_batch_size={1: 7, 3: 3}[num_steps])
    wanted = MetagradReward(chosen, PATTERN).score(TEXTS)
    monkeypatch.setattr("dpg.target.TEXTS_TOGETHER", together)
    scores = MetagradReward(chosen, PATTERN).score(TEXTS)
    torch.testing.assert_close(scores.rewards, wanted.rewards, rtol=1e-9, atol=1e-15)
    assert scores.phi == pytest.approx(wanted.phi, rel=1e-12)


@pytest.mark.parametrize("schedule", [mg.EveryStep(), mg.Binomial(slots=1)])
def test_schedules_change_no_bit(schedule):
    chosen = target(OPTIMIZERS["adamw"], inner_batch_size=2)
    assert torch.equal(
        MetagradReward(chosen, PATTERN, schedule=schedule)(TEXTS), MetagradReward(chosen, PATTERN)(TEXTS)
    )


@pytest.mark.parametrize("cross_group", [True, False])
@pytest.mark.parametrize(
    "metric",
    [
        lambda params: params["lm_head.weight"].sum() * math.nan,
        lambda params: params["lm_head.weight"].sum() / 0,
        lambda params: (params["lm_head.weight"] * 0).sum().sqrt(),  # 0, with an infinite derivative
    ],
    ids=["nan", "infinite", "nan gradient"],
)
def test_a_metric_that_is_not_a_number_is_raised(metric, cross_group):
    reward = MetagradReward(target(OPTIMIZERS["sgd"]), metric, cross_group=cross_group)
    with pytest.raises(mg.NonFiniteError, match="metric"):
        reward(TEXTS[:6], group_size=2)


def test_a_training_run_that_diverges_is_raised():
    with pytest.raises(mg.NonFiniteError, match="step 1"):
        MetagradReward(target(mg.optim.sgd(lr=1e300)), PATTERN)(TEXTS)
