"""Shrink a parameter of the target by data alone."""

from dataclasses import dataclass

from dpg.experiments.experiment import Experiment
from dpg.metrics import WeightNorm


@dataclass(frozen=True)
class Norm(Experiment):
    """Lower the L2 norm of one parameter, with no weight decay to do it.

    Args:
        parameter: its name in the target; None for the LM head.
    """

    parameter: str | None = None

    name = "norm"
    goal = "lower the L2 norm of the target's LM head"
    figure = "norm_drop"

    def metric(self) -> WeightNorm:
        return WeightNorm(self.parameter)
