"""Metagradients as rewards inside TRL's GRPOTrainer: pip install 'metagrad[trl]'."""

from importlib import import_module
from typing import Any

_HOMES = {
    "GrouplessGRPOTrainer": "trainer",
    "PresetReward": "preset",
    "RewardFunction": "reward",
    "TrlEngine": "engine",
    "preset_reward": "preset",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported when first used: the reward needs no TRL, and TRL takes seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module 'dpg.trl' has no attribute {name!r}")
    return getattr(import_module(f"dpg.trl.{_HOMES[name]}"), name)
