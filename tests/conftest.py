"""Settings of every test: float64, one thread, no network, the same Hypothesis examples at each run."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # Before transformers is imported: tests build their models and fetch nothing.

import problems  # noqa: E402  # after the environment is set
import torch  # noqa: E402  # after the environment is set
from hypothesis import HealthCheck, settings  # noqa: E402  # after the environment is set

from metagrad import _compiled  # noqa: E402  # after the environment is set

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
# torch gives some warnings once in a process; which test meets them must not depend on the order of the tests.
torch.set_warn_always(True)

# An example is a training run, and the first one of a process pays for imports: neither is a sign of a slow test.
settings.register_profile(
    "deterministic", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deterministic")


def pytest_addoption(parser):
    parser.addoption("--step", default="{}", help='settings of every step, such as {"compile": true}, as JSON')


def pytest_configure(config):
    problems.STEP.update(json.loads(config.getoption("--step")))
    if problems.STEP.get("compile"):
        _compiled.MAX_GRAPHS = 1000  # Of a problem, whose graphs serve all its tests.
    for kind in ("DeprecationWarning", "FutureWarning") if problems.STEP.get("compile") else ():
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")  # of compilers
    # torch scripts its own forward-mode formulas on entering a dual level; nothing of ours calls torch.jit.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
