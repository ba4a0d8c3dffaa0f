"""Advantages, the clipped loss and the KL estimate, against the same formulas written token by token."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpg.grpo import GrpoConfig, group_advantages, kl_estimate, policy_loss

REWARDS = (
    st.tuples(st.integers(1, 5), st.integers(2, 4))
    .flatmap(
        lambda shape: st.lists(
            st.lists(st.integers(-100, 100), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        )
    )
    .filter(lambda rows: len({value for row in rows for value in row}) > 1)
)
LOG_PROBS = st.lists(st.floats(-5, 0), min_size=6, max_size=6)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
def test_advantages_are_those_of_a_loop(normalize, scale):
    rewards = (scale * random(5, 4, seed=1)).tolist()
    spread = statistics.stdev([r for group in rewards for r in group])
    wanted = []
    for group in rewards:
        centred = [(r - sum(group) / 4) / spread for r in group]
        wanted.append([c / (statistics.stdev(centred) + 1e-6) for c in centred] if normalize else centred)
    advantages = group_advantages(torch.tensor(rewards), normalize=normalize)
    torch.testing.assert_close(advantages, torch.tensor(wanted), rtol=1e-12, atol=1e-14)


@given(rewards=REWARDS, normalize=st.booleans(), exponent=st.integers(-12, 9))
def test_the_scale_of_the_rewards_does_not_matter(rewards, normalize, exponent):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(rewards, normalize=normalize)
    scaled = group_advantages(rewards * 10.0**exponent, normalize=normalize)
    # A group whose rewards all agree keeps the rounding of their mean, 1e-16, over the 1e-6 of the formula.
    torch.testing.assert_close(scaled, advantages, rtol=1e-12, atol=1e-9 if normalize else 1e-12)


@given(rewards=REWARDS, normalize=st.booleans())
def test_the_advantages_of_a_group_sum_to_zero(rewards, normalize):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), normalize=normalize)
    assert float(advantages.sum(dim=1).abs().max()) <= 1e-9


def test_rewards_of_1e_minus_9_lose_nothing():
    rewards = random(6, 4, seed=2)
    for normalize in (True, False):
        tiny = group_advantages(rewards * 1e-9, normalize=normalize)
        torch.testing.assert_close(tiny, group_advantages(rewards, normalize=normalize), rtol=1e-12, atol=0)


def test_a_group_whose_rewards_agree_learns_nothing():
    advantages = group_advantages(torch.tensor([[3.0, 3.0], [1.0, 2.0]]), normalize=True)
    assert advantages[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(advantages[1], torch.tensor([-1.0, 1.0]) / math.sqrt(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_texts_that_are_all_worth_the_same_teach_nothing(normalize):
    assert group_advantages(torch.full((3, 2), -8.0), normalize=normalize).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "all 6 rewards are 0: .* nothing to do with the metric"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
    ],
)
def test_rewards_that_mean_nothing_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.full((3, 2), value), normalize=True)


def policy_loss_by_hand(new, old, advantages, mask, clip_range):
    total, count = 0.0, 0
    for i in range(len(new)):
        for t in range(len(new[i])):
            if not mask[i][t]:
                continue
            ratio = math.exp(new[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
            total += min(ratio * advantages[i], clipped * advantages[i])
            count += 1
    return -total / count


def test_the_policy_loss_is_that_of_a_loop():
    # Ratios below, within and above 1 ± 0.2, each with a positive and a negative advantage.
    moves = torch.tensor([[-1.0, -0.1, 0.1, 1.0, 9.0], [-1.0, -0.1, 0.1, 1.0, -9.0]])
    old = random(2, 5, seed=3) - 2
    advantages = torch.tensor([1.5, -0.7])
    mask = torch.tensor([[True, True, True, True, False]] * 2)
    new = (old + moves).requires_grad_()
    loss = policy_loss(new, old, advantages, mask, 0.2)
    wanted = policy_loss_by_hand(new.tolist(), old.tolist(), advantages.tolist(), mask.tolist(), 0.2)
    assert loss.item() == pytest.approx(wanted, rel=1e-13)
    loss.backward()
    # Only what would move further the way it has already gone too far is held: (1, up) and (2, down).
    held = torch.tensor([[False, False, False, True, True], [True, False, False, False, True]])
    slope = torch.where(held, 0.0, -advantages[:, None] * moves.exp() / 8)
    torch.testing.assert_close(new.grad, slope, rtol=1e-12, atol=0)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logits = random(3, 4, 6, seed=4).requires_grad_()
    written = torch.tensor([[0, 5, 2, 2], [1, 1, 3, 0], [4, 2, 0, 5]])
    mask = torch.tensor([[True, True, True, True], [True, False, False, False], [True, True, True, False]])
    advantages = torch.tensor([1.0, -2.0, 0.5])
    log_probs = logits.log_softmax(dim=2).gather(2, written[..., None])[..., 0]
    loss = policy_loss(log_probs, log_probs.detach(), advantages, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, logits)
    wanted, scores = torch.zeros_like(gradient), logits.tolist()
    for i in range(3):
        for t in range(4):
            for token in range(6):  # ∂ log softmax / ∂ logit = 1[written] − p
                p = math.exp(scores[i][t][token]) / sum(math.exp(z) for z in scores[i][t])
                if mask[i, t]:
                    wanted[i, t, token] = -advantages[i] * (float(written[i, t] == token) - p) / 8
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)


@given(new=LOG_PROBS, reference=LOG_PROBS)
def test_the_kl_estimate_is_that_of_a_loop_and_never_negative(new, reference):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    left, right = torch.tensor(new).reshape(2, 3), torch.tensor(reference).reshape(2, 3)
    kl = float(kl_estimate(left, right, mask))
    kept = [0, 1, 3, 4, 5]
    wanted = sum(math.exp(reference[i] - new[i]) - 1 - (reference[i] - new[i]) for i in kept) / 5
    assert kl == pytest.approx(wanted, rel=1e-9, abs=1e-13)
    assert kl >= -1e-16  # exp(x) − 1 − x of a tiny x rounds to either side of zero.


def test_the_kl_to_oneself_is_zero():
    log_probs = random(2, 3, seed=5)
    assert float(kl_estimate(log_probs, log_probs, torch.ones(2, 3, dtype=torch.bool))) == 0.0


def test_the_kl_estimate_has_the_mean_of_the_kl():
    p, q = random(7, seed=6).softmax(0), random(7, seed=7).softmax(0)
    mean = 0.0
    for token in range(7):  # The exact expectation under p, one token at a time.
        one = kl_estimate(
            p[token].log().reshape(1, 1), q[token].log().reshape(1, 1), torch.ones(1, 1, dtype=torch.bool)
        )
        mean += float(p[token] * one)
    assert mean == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)


@pytest.mark.parametrize(
    "wrong", [{"group_size": 1}, {"num_steps": 0}, {"prompts_per_step": 0}, {"updates_per_step": 0}]
)
def test_a_configuration_that_cannot_work_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GrpoConfig(**wrong)


def test_the_learning_rate_falls_linearly_to_its_last_value():
    config = GrpoConfig(num_steps=5, learning_rate=0.8, final_learning_rate=0.4)
    assert [config.learning_rate_at(step) for step in range(1, 6)] == pytest.approx(
        [0.8, 0.7, 0.6, 0.5, 0.4], rel=1e-15
    )
    assert [GrpoConfig(learning_rate=0.8).learning_rate_at(step) for step in (1, 50, 100)] == [0.8, 0.8, 0.8]
    assert GrpoConfig(num_steps=1, learning_rate=0.8, final_learning_rate=0.4).learning_rate_at(1) == 0.8
