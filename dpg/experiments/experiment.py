"""What an experiment is: a name, a goal, settings, and a pattern for the target's weights."""

from collections.abc import Callable
from dataclasses import dataclass

from dpg.metrics import WeightPattern
from dpg.settings import Settings


@dataclass(frozen=True)
class Experiment:
    """One thing to teach a target model by data alone.

    Args:
        name: as given to `dpg run`.
        goal: one line for `dpg list`.
        settings: the defaults.
        metric: Φ for given settings.
    """

    name: str
    goal: str
    settings: Settings
    metric: Callable[[Settings], WeightPattern]
