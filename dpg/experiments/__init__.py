"""The experiments that `dpg run` knows, by name."""

from dpg.experiments.experiment import Experiment
from dpg.experiments.sixseven import SixSeven

EXPERIMENTS: dict[str, type[Experiment]] = {experiment.name: experiment for experiment in (SixSeven,)}
