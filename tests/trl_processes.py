"""One of the processes of `test_dpg_trl_reward.py`: what it gets for its part of a batch, or which error."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from dpg_problems import ADAMW, TEXTS, target

import metagrad as mg
from dpg.metrics import WeightPattern
from dpg.reward import MetagradReward
from dpg.trl import RewardFunction

PATTERN = WeightPattern(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]), offset=(1, 2), strength=5.0)
BATCH = [*TEXTS, "kjih"]
"""Four prompts with two texts each."""


def function() -> RewardFunction:
    """The reward that is compared."""
    return RewardFunction(MetagradReward(target(mg.optim.adamw(**ADAMW), inner_batch_size=8), PATTERN), 2)


def called(reward: RewardFunction, texts: list, first: int) -> dict:
    """What a process that has `texts` gets, the first of which is number `first` of the batch."""
    logged: dict = {}
    try:
        logged["rewards"] = reward(
            prompts=[f"prompt {(first + i) // 2}" for i in range(len(texts))],
            completions=texts,
            completion_ids=[[0] * len(text) for text in texts],
            log_metric=logged.__setitem__,
            log_extra=logged.__setitem__,
        )
    except Exception as error:
        logged["error"] = f"{type(error).__name__}: {error}"
    return logged


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    cut = [slice(0, 3), slice(3, 8)][dist.get_rank()]  # Not even, and through the middle of a group.
    failing = RewardFunction(MetagradReward(target(mg.optim.sgd(lr=1e300)), PATTERN), 2)
    malformed = [*BATCH[:7], {"role": "tool"}]
    cases = {
        "whole": called(function(), BATCH[cut], cut.start),
        "failing": called(failing, BATCH[cut], cut.start),
        "malformed": called(function(), malformed[cut], cut.start),
        "scattered": called(function(), BATCH[cut], cut.start + 1),
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(cases))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
