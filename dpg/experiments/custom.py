"""Any differentiable function of the trained target, of the user's own."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from dpg.experiments.experiment import Experiment
from dpg.metrics import ParamsMetric, TargetMetric


@dataclass(frozen=True)
class Custom(Experiment):
    """Φ is a function of the trained parameters, by name a tensor, or a `dpg.metrics.TargetMetric`.

    Args:
        function: where it is: `module:name`, importable from where one is, or `path/to/file.py:name`.
    """

    function: str = ""

    name = "custom"
    goal = "any differentiable function of the trained target (--metric module:name)"

    def metric(self) -> TargetMetric | ParamsMetric:
        module_name, colon, name = self.function.rpartition(":")
        if not colon or not module_name or not name:
            raise ValueError(f"the metric is {self.function!r}. Pass --metric module:name or --metric file.py:name.")
        found = getattr(_module(module_name), name, None)
        if not callable(found) and not isinstance(found, TargetMetric):
            raise ValueError(f"{module_name} has no metric {name!r}: a function of the parameters, or a TargetMetric.")
        if isinstance(found, type):
            raise ValueError(
                f"{self.function} is a class. Make one of it in the file, `metric = {name}(...)`, and name that."
            )
        return found


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")  # A console script does not look where one is.
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"{name!r} cannot be imported from {Path.cwd()}: {error}.") from error
    path = Path(name).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
