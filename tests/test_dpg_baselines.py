"""Rewards to compare with are what their names say, written out text by text."""

import math
import random
from dataclasses import replace

import pytest
import torch
from dpg_problems import ADAMW, TEXTS, generator, gpt2, ids_of, letters, same_bits, target
from hypothesis import given, settings
from hypothesis import strategies as st

import metagrad as mg
from dpg.baselines import (
    LikenessReward,
    NaiveReward,
    RandomReward,
    ShuffledReward,
    edit_likeness,
    embedding_likeness,
)
from dpg.grpo import GrpoConfig, group_advantages
from dpg.judge import Judge
from dpg.loop import Validation, train
from dpg.metrics import WeightPattern
from dpg.reward import MetagradReward

PATTERN = WeightPattern(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]), offset=(1, 2), strength=5.0)
PAIRS = ["abcab", "k", "hgfedcba", "bbbbbb", "cafe", "jijij"]  # three prompts with two texts each


def chosen():
    return target(mg.optim.adamw(**ADAMW), inner_batch_size=2)


def test_naive_rewards_are_phi_of_each_data_set():
    scores = NaiveReward(chosen(), PATTERN).score(PAIRS, group_size=2)
    judge = Judge(chosen(), PATTERN)
    phis = [judge.trial([PAIRS[i] for i in places])["phi"] for places in ((0, 2, 4), (1, 3, 5))]
    torch.testing.assert_close(scores.rewards, torch.tensor(phis * 3), rtol=1e-15, atol=0)
    assert scores.phi == pytest.approx(sum(phis) / 2, rel=1e-15)
    assert same_bits(scores.params, chosen().fine_tune(PAIRS[::2]))


def test_naive_rewards_are_compared_with_the_whole_batch():
    reward = NaiveReward(chosen(), PATTERN)
    assert reward.groupless and not MetagradReward(chosen(), PATTERN).groupless
    # Within groups the same two rewards meet everywhere; a whole batch of equal pairs has the same signs.
    whole = group_advantages(reward(PAIRS, 2).reshape(1, 6), normalize=True)
    assert set(whole.sign().flatten().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("group_size", [None, 4])
def test_naive_rewards_need_whole_groups(group_size):
    with pytest.raises(ValueError, match="must come in whole groups"):
        NaiveReward(chosen(), PATTERN)(PAIRS, group_size)


def test_shuffled_rewards_are_the_same_numbers_elsewhere():
    exact = MetagradReward(chosen(), PATTERN)
    torch.manual_seed(0)
    shuffled = ShuffledReward(exact).score(TEXTS)
    wanted = exact.score(TEXTS)
    assert sorted(shuffled.rewards.tolist()) == sorted(wanted.rewards.tolist())
    assert not torch.equal(shuffled.rewards, wanted.rewards) and shuffled.phi == wanted.phi
    torch.manual_seed(0)
    assert torch.equal(shuffled.rewards, ShuffledReward(exact).score(TEXTS).rewards)
    assert not torch.equal(shuffled.rewards, ShuffledReward(exact).score(TEXTS).rewards)


def test_random_rewards_do_not_look_at_the_texts():
    torch.manual_seed(0)
    first = RandomReward().score(TEXTS)
    torch.manual_seed(0)
    assert torch.equal(first.rewards, RandomReward()(["a"] * len(TEXTS)))
    assert first.phi is None and first.params is None


def distance(left, right):
    """The edit distance by its recursion."""
    if not left or not right:
        return len(left) + len(right)
    return min(
        distance(left[1:], right) + 1,
        distance(left, right[1:]) + 1,
        distance(left[1:], right[1:]) + (left[0] != right[0]),
    )


SHORT = st.text("abc", max_size=5)


@settings(max_examples=30)
@given(st.lists(SHORT, min_size=1, max_size=3), st.lists(SHORT, min_size=1, max_size=3))
def test_edit_likeness_is_the_mean_edit_distance(texts, wanted):
    found = edit_likeness(wanted, letters())(texts)
    by_hand = [-sum(distance(ids_of(text), ids_of(other)) for other in wanted) / len(wanted) for text in texts]
    torch.testing.assert_close(found.double(), torch.tensor(by_hand), rtol=1e-6, atol=0)


def test_embedding_likeness_is_the_mean_cosine_of_mean_states():
    model, wanted = gpt2(), ["abc", "kk"]

    @torch.no_grad()
    def embedding(text):
        ids = torch.tensor([[*ids_of(text), len("abcdefghijk")]])
        return model.transformer(ids).last_hidden_state[0].mean(dim=0)

    found = embedding_likeness(wanted, model, letters(), sequence_length=20)(TEXTS)
    for value, text in zip(found.tolist(), TEXTS, strict=True):
        cosines = [torch.cosine_similarity(embedding(text), embedding(other), dim=0) for other in wanted]
        assert value == pytest.approx(float(sum(cosines)) / 2, rel=1e-12)


@pytest.mark.parametrize(
    "reward",
    [
        NaiveReward(chosen(), PATTERN),
        ShuffledReward(MetagradReward(chosen(), PATTERN)),
        RandomReward(),
        LikenessReward(edit_likeness(["abc"], letters())),
    ],
    ids=lambda reward: type(reward).__name__,
)
def test_every_reward_trains_a_generator_and_is_judged_alike(reward):
    prompts = ["abc", "k", "hg", "ffff", "cab"]
    config = GrpoConfig(num_steps=2, prompts_per_step=4, group_size=2, learning_rate=0.02)
    judge = Judge(chosen(), PATTERN, lambda texts: {"letters": sum(map(len, texts)) / len(texts)})
    records = []
    train(
        generator(),
        prompts,
        reward,
        config,
        judge=judge,
        validation=Validation(["dd", "bg"], num_texts=4, every=2),
        on_step=lambda record, checkpoint: records.append(record),
    )
    assert [record.step for record in records] == [0, 1, 2]
    for record in (records[0], records[2]):
        assert record.validation == judge.trial(record.texts)
        assert record.validation["letters"] == sum(map(len, record.texts)) / 4
    assert all((record.phi is None) == (reward.judge is None) for record in records[1:])


def test_a_validation_that_nobody_judges_is_refused():
    config = GrpoConfig(num_steps=1, prompts_per_step=2, group_size=2)
    with pytest.raises(ValueError, match="RandomReward trains no target to validate with. Pass `judge`"):
        train(generator(), ["a", "b"], RandomReward(), config, validation=Validation(["dd"]))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda params: params["lm_head.weight"].square(), r"a tensor of shape \(12, 8\)"),
        (
            lambda params: params["lm_haed.weight"].sum(),
            "asks for 'lm_haed.weight', which .* Close names are 'lm_head.w",
        ),
        (lambda params: 1.0, "returned 1.0. Return a scalar tensor"),
        (lambda params: torch.tensor(3.0), "does not depend on the trained parameters"),
        (lambda params: params["lm_head.weight"].detach().sum(), "does not depend on the trained parameters"),
    ],
    ids=["matrix", "name", "number", "constant", "detached"],
)
def test_a_metric_that_cannot_be_differentiated_is_refused_before_training(metric, message):
    with pytest.raises(ValueError, match=message):
        MetagradReward(chosen(), metric)


def test_the_judge_is_the_fine_tune_and_the_metric():
    judge = Judge(chosen(), PATTERN)
    found = judge.trial(TEXTS)
    change = chosen().fine_tune(TEXTS)["lm_head.weight"] - chosen().model.lm_head.weight.detach()
    pixels = [float(PATTERN.image[r, c] * change[2 + c, 1 + r]) for r in range(2) for c in range(3)]
    assert found["phi"] == pytest.approx(-sum(math.log1p(math.exp(-5 * p)) for p in pixels) / 6, rel=1e-12)
    assert found["pixel_accuracy"] == sum(p > 0 for p in pixels) / 6
    assert found.keys() == {"phi", "pixel_accuracy"}


def test_a_pattern_may_be_read_further():
    seen = []
    pattern = replace(PATTERN, reading=lambda signs: seen.append(signs) or {"white": float((signs > 0).sum())})
    figures = Judge(chosen(), pattern).trial(random.Random(0).sample(TEXTS, 5))
    assert figures["white"] == float((seen[-1] > 0).sum()) and seen[-1].abs().eq(1).all()
