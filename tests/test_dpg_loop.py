"""A GRPO run is a function of its seed: repeated, interrupted or validated, it gives the same bits."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from dpg_problems import (
    ADAMW,
    copy_of,
    generator,
    largest_difference,
    parameters,
    same_bits,
    target,
    written_log_probs,
)

import metagrad as mg
from dpg.generator import Generator
from dpg.grpo import GrpoConfig
from dpg.loop import Checkpoint, Validation, train, write
from dpg.metrics import WeightPattern
from dpg.policy import Policy
from dpg.reward import MetagradReward

PATTERN = WeightPattern(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]))
PROMPTS = ["abc", "k", "hg", "ffff", "cab", "de", "ij", "kkb", "a", "gfe"]
CONFIG = GrpoConfig(num_steps=3, prompts_per_step=4, group_size=2, learning_rate=0.02, updates_per_step=2)
VALIDATION = Validation(["dd", "bg", "cj"], num_texts=5, every=2)


class Stop(Exception):
    """Ends a run from its hook."""


def reward(metric=PATTERN, **settings):
    return MetagradReward(target(mg.optim.adamw(**ADAMW), inner_batch_size=8), metric, **settings)


def through_a_file(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint._asdict(), file)
    file.seek(0)
    return Checkpoint(**torch.load(file, weights_only=True))


def finished(
    *, seed=0, stop_after=None, config=CONFIG, validation=VALIDATION, metric=PATTERN, resume=None, keep=through_a_file
):
    """The trained generator's parameters, the records, and the checkpoint of every step."""
    chosen, records, checkpoints = generator(), [], {}

    def on_step(record, take_checkpoint):
        records.append(record._replace(seconds=0.0))
        checkpoints[record.step] = keep(take_checkpoint())
        if record.step == stop_after:
            raise Stop

    arguments = {"validation": validation, "seed": seed, "resume": resume, "on_step": on_step}
    try:
        train(chosen, PROMPTS, reward(metric), config, **arguments)
    except Stop:
        assert stop_after is not None
    return parameters(chosen.model), records, checkpoints


def test_equal_seeds_give_equal_bits():
    first, second, other = finished(), finished(), finished(seed=1)
    assert same_bits(first[0], second[0]) and first[1] == second[1]
    assert not same_bits(first[0], other[0])
    assert [record.step for record in first[1]] == [0, 1, 2, 3]


def test_the_generator_is_trained_and_the_target_is_not():
    chosen, scored = generator(), reward()
    before = parameters(scored.target.model)
    train(chosen, PROMPTS, scored, CONFIG)
    assert largest_difference(parameters(chosen.model), parameters(generator().model)) > 1e-3
    assert same_bits(parameters(scored.target.model), before)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(stop_after, kl_coefficient):
    config = replace(CONFIG, kl_coefficient=kl_coefficient)
    whole, records, _ = finished(config=config)
    _, first, checkpoints = finished(config=config, stop_after=stop_after)
    resumed, rest, _ = finished(config=config, resume=checkpoints[stop_after])
    assert [record.step for record in rest] == list(range(stop_after + 1, 4))
    assert same_bits(resumed, whole) and first + rest == records


def test_a_checkpoint_is_a_value():
    whole, records, checkpoints = finished(keep=lambda checkpoint: checkpoint)
    resumed, rest, _ = finished(resume=checkpoints[1])
    assert same_bits(resumed, whole) and rest == records[2:]


def test_validation_does_not_change_the_training():
    with_it, records, _ = finished()
    without, others, _ = finished(validation=None)
    assert same_bits(with_it, without)
    assert [record._replace(validation=None, texts=None) for record in records if record.step > 0] == others
    assert [record.validation is not None for record in records] == [True, False, True, True]


def test_validation_is_an_ordinary_fine_tune_on_fresh_texts():
    _, records, checkpoints = finished()
    for step in (2, 3):
        chosen, scored = generator(), reward()
        chosen.model.load_state_dict(checkpoints[step].generator)
        torch.manual_seed(1_000_003 + step)
        texts = write(chosen, VALIDATION.prompts, 5)
        params = scored.target.fine_tune(texts)
        figures = PATTERN.bind(scored.target.model, scored.target.tokenizer).measure(params)
        assert records[step].validation == {"phi": scored.phi(params), **figures}
        assert records[step].texts == texts


def test_the_callers_random_numbers_are_untouched():
    chosen, scored = generator(), reward()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(chosen, PROMPTS, scored, CONFIG, validation=VALIDATION, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_prompts():
    with pytest.raises(ValueError, match="3 prompts were given.*every step draws 4 of them"):
        train(generator(), PROMPTS[:3], reward(), CONFIG)


@pytest.mark.parametrize("step", [1, 3])
def test_a_reward_that_is_not_finite_names_the_step(step):
    seen = []

    def metric(params):
        broken = len(seen) == step - 1
        return params["lm_head.weight"].sum() * (math.nan if broken else 1.0)

    with pytest.raises(mg.NonFiniteError, match=f"^GRPO step {step}: "):
        train(generator(), PROMPTS, reward(metric), CONFIG, on_step=lambda record, checkpoint: seen.append(record))
    assert [record.step for record in seen] == list(range(1, step))


def test_a_policy_that_is_not_finite_names_the_step():
    # One update by 1e200 makes the second log-probabilities of the same step infinite or NaN.
    with pytest.raises(mg.NonFiniteError, match="^GRPO step 1: .*not finite.*Lower `learning_rate`"):
        train(generator(), PROMPTS, reward(), replace(CONFIG, learning_rate=1e200))


def recorded_samples(monkeypatch):
    """A copy of the generator and its rollouts at every call of `sample`: one call a step without validation."""
    calls, original = [], Generator.sample

    def sample(self, prompts, group_size=1):
        rollouts = original(self, prompts, group_size)
        calls.append((replace(self, model=copy_of(self.model)), rollouts))
        return rollouts

    monkeypatch.setattr(Generator, "sample", sample)
    return calls


def test_the_reference_stays_the_initial_generator(monkeypatch):
    calls = recorded_samples(monkeypatch)
    config = replace(CONFIG, updates_per_step=1, kl_coefficient=0.1)
    _, records, _ = finished(config=config, validation=None)
    initial = generator()
    for (before, rollouts), record in zip(calls, records, strict=True):
        total, count = 0.0, 0
        for row in range(len(rollouts.texts)):
            ours = written_log_probs(before, rollouts, row).tolist()
            theirs = written_log_probs(initial, rollouts, row).tolist()
            total += sum(math.exp(b - a) - 1 - (b - a) for a, b in zip(ours, theirs, strict=True))
            count += len(ours)
        assert record.kl == pytest.approx(total / count, rel=1e-9, abs=1e-15)
        assert record.num_tokens == count
    assert records[0].kl == 0 and records[2].kl > 1e-4


def test_without_a_coefficient_there_is_no_kl():
    _, records, _ = finished()
    assert all(record.kl == 0.0 for record in records)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
def test_the_first_steps_are_those_of_a_loop(monkeypatch, kl_coefficient):
    """Two GRPO steps again, from the rollouts and rewards alone: one text at a time, one optimizer of torch."""
    calls = recorded_samples(monkeypatch)
    config = replace(CONFIG, num_steps=2, updates_per_step=1, max_grad_norm=0.3, kl_coefficient=kl_coefficient)
    trained, _, _ = finished(config=config, validation=None)
    chosen, initial = generator(), generator()
    optimizer = torch.optim.AdamW(chosen.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    for _, rollouts in calls:
        rewards = reward()(rollouts.texts).reshape(4, 2)
        terms = []
        for row in range(8):
            pair, spread = rewards[row // 2], rewards.std()
            advantage = (pair[row % 2] - pair.mean()) / spread / (pair.std() / spread + 1e-6)
            log_probs = written_log_probs(chosen, rollouts, row)
            difference = written_log_probs(initial, rollouts, row).detach() - log_probs
            kl = difference.exp() - 1 - difference
            terms.append(-advantage * (log_probs - log_probs.detach()).exp() + kl_coefficient * kl)
        optimizer.zero_grad()
        torch.cat(terms).mean().backward()
        torch.nn.utils.clip_grad_norm_(chosen.model.parameters(), 0.3)
        optimizer.step()
    # Adam divides by |g| + 1e-8: where g is zero but for rounding (1e-17) the update may differ by lr · 1e-9.
    assert largest_difference(trained, parameters(chosen.model)) <= 1e-9


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_what_another_type_sampled_is_compared_with_the_policy_itself(microbatch_size):
    """Half-precision log-probabilities would make ratios of rounding; with any put in their place nothing changes."""
    trained = []
    for shift in (0.0, 5.0):
        chosen = generator(sampling_dtype=torch.bfloat16)
        policy = Policy.of(chosen, replace(CONFIG, kl_coefficient=0.1, microbatch_size=microbatch_size))
        torch.manual_seed(4)
        rollouts = chosen.sample(PROMPTS[:4], group_size=2)
        policy.improve(rollouts._replace(log_probs=rollouts.log_probs + shift), torch.linspace(-1, 1, 8), 0.02)
        trained.append(parameters(chosen.model))
    assert same_bits(*trained)
    assert largest_difference(trained[0], parameters(generator().model)) > 1e-3


@pytest.mark.parametrize("microbatch_size", [1, 3, 8])
def test_micro_batches_of_the_policy_change_no_number_but_by_rounding(microbatch_size):
    config = replace(CONFIG, num_steps=1, kl_coefficient=0.1, entropy_coefficient=0.2)
    whole, records, _ = finished(config=config, validation=None)
    cut, others, _ = finished(config=replace(config, microbatch_size=microbatch_size), validation=None)
    assert others[0].kl == pytest.approx(records[0].kl, rel=1e-9)
    # As above: Adam may turn rounding into updates of lr · 1e-9.
    assert largest_difference(whole, cut) <= 1e-9


def test_the_entropy_bonus_is_the_gradient_of_the_written_out_entropy(monkeypatch):
    calls = recorded_samples(monkeypatch)
    config = replace(CONFIG, num_steps=1, updates_per_step=1, max_grad_norm=1e9, entropy_coefficient=0.4)
    trained, _, _ = finished(config=config, validation=None)
    plain, _, _ = finished(config=replace(config, entropy_coefficient=0.0), validation=None)
    assert largest_difference(trained, plain) > 1e-4
    (_, rollouts), chosen = calls[0], generator()
    rewards = reward()(rollouts.texts).reshape(4, 2)
    terms = []
    for row in range(8):
        pair, spread = rewards[row // 2], rewards.std()
        advantage = (pair[row % 2] - pair.mean()) / spread / (pair.std() / spread + 1e-6)
        log_probs = written_log_probs(chosen, rollouts, row)
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist()
        written = rollouts.token_ids[row][rollouts.token_mask[row]].tolist()
        logits = chosen.model(torch.tensor([prompt + written]), use_cache=False).logits[0]
        p = logits[len(prompt) - 1 : -1].softmax(dim=1)
        terms.append(-advantage * (log_probs - log_probs.detach()).exp() + 0.4 * (p * p.log()).sum(dim=1))
    optimizer = torch.optim.AdamW(chosen.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    torch.cat(terms).mean().backward()
    optimizer.step()
    assert largest_difference(trained, parameters(chosen.model)) <= 1e-9


def test_write_returns_as_many_texts_as_asked():
    torch.manual_seed(0)
    texts = write(generator(), ["a", "b"], 5, batch_size=4)
    assert len(texts) == 5 and len(set(texts)) > 1


def test_the_hook_sees_values():
    seen = []
    chosen = generator()
    train(
        chosen,
        PROMPTS,
        reward(),
        CONFIG,
        on_step=lambda record, checkpoint: seen.append((record, copy.deepcopy(record))),
    )
    assert [record for record, _ in seen] == [then for _, then in seen]
