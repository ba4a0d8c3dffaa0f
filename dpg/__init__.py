"""Dataset Policy Gradients: train a language model to write the data that makes another model what you want."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Generator": "generator",
    "GrpoConfig": "grpo",
    "Judge": "judge",
    "LikenessReward": "baselines",
    "MetagradReward": "reward",
    "NaiveReward": "baselines",
    "RandomReward": "baselines",
    "ShuffledReward": "baselines",
    "Target": "target",
    "Validation": "loop",
    "load_model": "target",
    "metrics": "metrics",
    "train": "loop",
    "untie_head": "target",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported when first used: `dpg.verify` must run without metagrad, and `dpg --help` without torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'dpg' has no attribute {name!r}")
    module = import_module(f"dpg.{_HOMES[name]}")
    return module if name == "metrics" else getattr(module, name)
