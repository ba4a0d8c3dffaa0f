"""Where the time of a GRPO step goes: sampling, the reward with its metagradient, the update of the policy.

    python benchmarks/grpo.py sixseven
    python benchmarks/grpo.py sixseven --set device=cuda --set generator=FOLDER --set target=FOLDER --steps 5

Settings are those of `dpg run`. The first step, in which everything starts, is stated apart.
"""

import argparse
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from einops import rearrange

from dpg.build import Parts, build
from dpg.grpo import group_advantages
from dpg.policy import Policy
from dpg.preset import load, parse
from dpg.upkeep import keep_freed_memory

PARTS = ("sampling", "reward", "policy update")


@dataclass
class Spent:
    """Seconds of each part, a list entry for each step."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    num_tokens: list[int] = field(default_factory=list)


def measure(parts: Parts, num_steps: int) -> Spent:
    """The times of `num_steps` GRPO steps, whose parts follow one another as in `dpg.loop.grpo_step`."""
    policy, config, spent = Policy.of(parts.generator, parts.config), parts.config, Spent()
    for step in range(1, num_steps + 1):
        marks = [_now()]
        chosen = torch.randperm(len(parts.prompts))[: config.prompts_per_step].tolist()
        rollouts = policy.generator.sample([parts.prompts[i] for i in chosen], config.group_size)
        marks.append(_now())
        scores = parts.reward.score(rollouts.texts, config.group_size)
        marks.append(_now())
        grouped = rearrange(scores.rewards, "(groups texts) -> groups texts", texts=config.group_size)
        advantages = group_advantages(grouped, normalize=config.normalize_groups).flatten()
        policy.improve(rollouts, advantages.to(rollouts.token_ids.device), config.learning_rate_at(step))
        marks.append(_now())
        for part, start, end in zip(PARTS, marks, marks[1:], strict=False):
            spent.seconds[part].append(end - start)
        spent.num_tokens.append(int(rollouts.token_mask.sum()))
    return spent


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    preset = load(arguments.experiment, arguments.preset).changed(parse(arguments.set))
    start = perf_counter()
    parts = build(preset)
    torch.manual_seed(preset.settings.seed)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (parts.generator.model, parts.judge.target.model)]
    print(f"generator of {sizes[0]:,} parameters, target of {sizes[1]:,}; loaded in {perf_counter() - start:.1f} s")
    spent = measure(parts, arguments.steps)
    print(f"{'':<16}{'first':>9}{'median':>9}{'least':>9}{'most':>9}  seconds")
    totals = [sum(step) for step in zip(*spent.seconds.values(), strict=True)]
    for name, (first, *others) in {**spent.seconds, "whole step": totals}.items():
        print(f"{name:<16}{first:9.3f}{median(others):9.3f}{min(others):9.3f}{max(others):9.3f}")
    print(f"{median(spent.num_tokens):.0f} tokens written a step")
    if torch.cuda.is_initialized():
        print(f"{torch.cuda.get_device_name()}: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the most")


if __name__ == "__main__":
    main()
