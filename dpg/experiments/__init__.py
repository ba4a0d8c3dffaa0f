"""The experiments that `dpg run` knows, by name."""

from dpg.experiments import sixseven
from dpg.experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (sixseven.EXPERIMENT,)}
