"""What an experiment is: a goal for the target, in one value whose fields are options of the command line."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from dpg.metrics import ParamsMetric, TargetMetric


@dataclass(frozen=True)
class Experiment(ABC):
    """One thing to teach a target model by data alone. Fields of a subclass are options for `--set` and presets.

    Attributes:
        name: as given to `dpg run`.
        goal: one line for `dpg list`.
        figure: the figure that says how far a run came; higher is better.
    """

    name: ClassVar[str]
    goal: ClassVar[str]
    figure: ClassVar[str] = "phi"

    @abstractmethod
    def metric(self) -> TargetMetric | ParamsMetric:
        """Φ.

        Raises:
            ValueError: for options that cannot work.
        """

    def measure_texts(self, texts: list[str]) -> dict[str, float]:
        """Figures of the texts themselves, by name."""
        return {}

    def wanted(self) -> list[str]:
        """Texts like those the generator would best write, for the rewards that compare with them; none if unknown."""
        return []

    def whole_texts(self) -> list[str]:
        """Texts that have to be written from beginning to end, for which a run must leave room; none in most."""
        return []

    def likenesses(self) -> Mapping[str, Callable[[list[str]], Float[Tensor, " texts"]]]:
        """Rewards of this experiment's own that train no target, by name."""
        return {}
