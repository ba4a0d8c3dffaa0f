"""The experiments that `dpg run` knows, by name."""

from dpg.experiments.custom import Custom
from dpg.experiments.experiment import Experiment
from dpg.experiments.language import Language
from dpg.experiments.norm import Norm
from dpg.experiments.qr import Qr
from dpg.experiments.sixseven import SixSeven
from dpg.experiments.uuid import Uuid

EXPERIMENTS: dict[str, type[Experiment]] = {
    experiment.name: experiment for experiment in (SixSeven, Qr, Norm, Language, Uuid, Custom)
}
