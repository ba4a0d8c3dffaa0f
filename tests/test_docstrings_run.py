"""The examples in the docstrings run as a user would run them."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import metagrad

MODULES = sorted(path.stem for path in Path(metagrad.__file__).parent.glob("*.py") if path.stem != "__init__")


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


@pytest.mark.parametrize("function", ["metagradient", "train"])
def test_the_ways_in_have_an_example(function):
    assert doctest.DocTestFinder().find(getattr(metagrad, function))[0].examples
