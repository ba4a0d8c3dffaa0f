"""Every example runs, prints what its docstring says up to the digits, and fits on a screen or two."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def without_digits(text: str) -> list[str]:
    """The words of each line; numbers and the spaces around them may differ from machine to machine."""
    return [" ".join(re.sub(r"-?\d[\d.]*(e[+-]?\d+)?", "#", line).split()) for line in text.strip().splitlines()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_and_prints_what_it_says(example: Path) -> None:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, str(example)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.stderr == ""
    assert finished.returncode == 0
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    assert docstring is not None
    _, printed = docstring.split("Prints:\n")
    assert without_digits(finished.stdout) == without_digits(printed)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 80


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
