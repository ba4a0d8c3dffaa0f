"""The examples in the docstrings run as a user would run them."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import metagrad

ROOT = Path(metagrad.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py") if path.stem != "__init__"
)


@pytest.fixture
def float32():
    """The default precision of a user."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, float32):
    failed, _ = doctest.testmod(importlib.import_module(f"metagrad.{name}"))
    assert failed == 0


CHECKERS = [metagrad.check.finite_differences, metagrad.check.unrolled, metagrad.check.determinism]
CHECKERS += [metagrad.check.step_adjoint, metagrad.check.metasmoothness]


@pytest.mark.parametrize("function", [metagrad.metagradient, metagrad.train, *CHECKERS], ids=lambda f: f.__name__)
def test_the_ways_in_have_an_example(function):
    assert doctest.DocTestFinder().find(function)[0].examples
