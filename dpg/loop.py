"""Dataset Policy Gradients [thrush2026]: GRPO whose reward is a metagradient. The whole loop, top to bottom.

Differences from the authors' code: rewards are the exact dΦ/dw, rescaled by their spread before the advantage; a reward
that cannot be computed stops the run; the target's end tokens are trained and its padding never is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from einops import rearrange

import metagrad as mg
from dpg.generator import Generator
from dpg.grpo import GrpoConfig, group_advantages
from dpg.judge import Judge
from dpg.policy import Policy
from dpg.records import Checkpoint, Record
from dpg.reward import Reward

WRITTEN_AT_ONCE = 512
"""Texts that `write` asks a generator for at a time."""


@dataclass(frozen=True)
class Validation:
    """Fresh texts, written to prompts that are never trained on, and what they do to the target.

    Args:
        prompts: to draw from.
        num_texts: written each time, one to a prompt.
        every: GRPO steps between validations; the untrained and the finished generator are always validated.
    """

    prompts: list[str] = field(repr=False)
    num_texts: int = 1024
    every: int = 10

    def __post_init__(self) -> None:
        if not self.prompts or min(self.num_texts, self.every) < 1:
            raise ValueError(
                f"validation writes {self.num_texts} texts to {len(self.prompts)} prompts every {self.every} steps; "
                "none of the three may be less than 1."
            )


def train(
    generator: Generator,
    prompts: list[str],
    reward: Reward,
    config: GrpoConfig,
    *,
    judge: Judge | None = None,
    validation: Validation | None = None,
    seed: int = 0,
    resume: Checkpoint | None = None,
    on_step: Callable[[Record, Callable[[], Checkpoint]], None] = lambda record, checkpoint: None,
) -> None:
    """Train `generator` in place to write texts that move the target's metric up.

    Args:
        generator: the policy; to `resume`, the initial one, from which a KL penalty is measured.
        prompts: what it continues; `config.prompts_per_step` of them are drawn at each step.
        reward: how texts are scored.
        config: of GRPO.
        judge: what training on texts comes to, for records and validations; None for the reward's own.
        validation: how to validate; None for never.
        seed: of everything random. Equal seeds give equal bits on one machine with one number of threads.
        resume: continue after this checkpoint instead of starting, with the same bits as an uninterrupted run.
        on_step: called after every step (and once before the first) with its record and a function that takes a
            checkpoint. An exception it raises ends the run.

    Raises:
        ValueError: for too few prompts, or a validation that nobody judges.
        NonFiniteError: if a loss or reward is NaN or infinite, naming the GRPO step.
    """
    config.check(prompts)
    judge = reward.judge if judge is None else judge
    if validation is not None and judge is None:
        raise ValueError(f"{type(reward).__name__} trains no target to validate with. Pass `judge`.")
    policy = Policy.of(generator, config)
    with torch.random.fork_rng(_devices(generator)):  # The caller's random numbers are left as they were.
        torch.manual_seed(seed)
        if resume is not None:
            policy.restore(resume)
        elif validation is not None:
            figures, texts = validate(generator, judge, validation, seed, step=0)
            start = Record(0, figures["phi"], 0.0, 0.0, 0, 0.0, {}, figures, texts)
            on_step(start, partial(policy.checkpoint, 0))

        for step in range(1 if resume is None else resume.step + 1, config.num_steps + 1):
            record = grpo_step(policy, prompts, reward, judge, step)
            if validation is not None and (step % validation.every == 0 or step == config.num_steps):
                figures, texts = validate(generator, judge, validation, seed, step)
                record = record._replace(validation=figures, texts=texts)
            on_step(record, partial(policy.checkpoint, step))


def grpo_step(policy: Policy, prompts: list[str], reward: Reward, judge: Judge | None, step: int) -> Record:
    """Write texts, score them, improve the policy."""
    start, config = perf_counter(), policy.config
    chosen = torch.randperm(len(prompts))[: config.prompts_per_step]
    try:
        rollouts = policy.generator.sample([prompts[i] for i in chosen.tolist()], config.group_size)
        scores = reward.score(rollouts.texts, config.group_size)
        size = len(rollouts.texts) if reward.groupless else config.group_size
        grouped = rearrange(scores.rewards, "(groups texts) -> groups texts", texts=size)
        advantages = group_advantages(grouped, normalize=config.normalize_groups).flatten()
        kl = policy.improve(rollouts, advantages.to(rollouts.token_ids.device), config.learning_rate_at(step))
    except mg.NonFiniteError as error:
        raise mg.NonFiniteError(f"GRPO step {step}: {error}") from error
    return Record(
        step=step,
        phi=scores.phi,
        reward_std=float(scores.rewards.std()),
        seconds=perf_counter() - start,
        num_tokens=int(rollouts.token_mask.sum()),
        kl=kl,
        measures={} if judge is None or scores.params is None else judge.measures(scores.params, rollouts.texts),
        validation=None,
        texts=None,
    )


def validate(
    generator: Generator, judge: Judge, validation: Validation, seed: int, step: int
) -> tuple[dict[str, float], list[str]]:
    """Φ and the figures of a target trained on fresh texts, and the texts. Leaves the run's random numbers alone."""
    with torch.random.fork_rng(devices=_devices(generator)):
        torch.manual_seed(1_000_003 * (seed + 1) + step)
        texts = write(generator, validation.prompts, validation.num_texts)
        return judge.trial(texts), texts


def write(generator: Generator, prompts: list[str], num_texts: int, batch_size: int = WRITTEN_AT_ONCE) -> list[str]:
    """`num_texts` texts, one each to prompts drawn from `prompts`, again and again if there are too few."""
    rounds = [torch.randperm(len(prompts)) for _ in range(math.ceil(num_texts / len(prompts)))]
    parts = torch.cat(rounds)[:num_texts].split(batch_size)
    return [text for part in parts for text in generator.sample([prompts[i] for i in part.tolist()]).texts]


def _devices(generator: Generator) -> list[int]:
    """The devices besides the CPU whose random numbers the generator draws."""
    device = generator.model.device
    return [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
