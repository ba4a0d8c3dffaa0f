"""A reward that is made without arguments, for `trl grpo --reward_funcs dpg.trl.preset_reward`."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from dpg.build import build_reward
from dpg.preset import Preset, load
from dpg.reward import Reward, Scores
from dpg.trl.reward import RewardFunction

VARIABLE = "DPG_PRESET"


@dataclass(frozen=True)
class PresetReward(Reward):
    """The reward of a preset: its target, its metric, its `reward`. Made when first used, and small to pickle.

    Args:
        name: a preset of the package, as `sixseven-laptop`, or a YAML file, as `preset.yaml` in a run folder; None for
            the one that the environment variable DPG_PRESET names when a text is scored.

    Raises:
        ValueError: when called, if there is no such preset, or its models are not there.
    """

    name: str | None = None

    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        name = self.name or os.environ.get(VARIABLE)
        if not name:
            raise ValueError(f"set {VARIABLE} to a preset, as sixseven-laptop, or to a YAML file.")
        return _reward(name).score(texts, group_size)


preset_reward = RewardFunction(PresetReward())


@cache
def _reward(name: str) -> Reward:
    _, reward = build_reward(_preset(name))
    if reward.groupless:
        raise ValueError(
            f"the reward of {name} compares a text with the whole batch, and TRL's command line with those of its "
            "prompt. Use dpg run --engine trl, or GrouplessGRPOTrainer."
        )
    return reward


def _preset(name: str) -> Preset:
    if Path(name).suffix not in (".yaml", ".yml"):
        experiment, _, rest = name.partition("-")
        return load(experiment, rest or "laptop")
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{VARIABLE} names {name}, which is no YAML file: {' '.join(str(error).split())}") from error
    return load(content.get("experiment", "") if isinstance(content, dict) else "", name)
