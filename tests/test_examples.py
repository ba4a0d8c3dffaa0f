"""Every example runs, prints what its docstring says up to the digits, draws what it promises, and is short."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

# Importing pyplot wrote matplotlib's font cache, if it was missing: a program that has to write it says so on stderr.

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OWN = [path for path in EXAMPLES if path.name.startswith("own_")]


def without_digits(text: str) -> list[str]:
    """The words of each line; numbers and the spaces around them may differ from machine to machine."""
    return [" ".join(re.sub(r"-?\d[\d.]*(e[+-]?\d+)?", "#", line).split()) for line in text.strip().splitlines()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_does_what_it_says(example: Path, tmp_path: Path) -> None:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,  # Where the picture goes: the repository stays as it is.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search, "MPLBACKEND": "agg"},
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
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == (set() if example in OWN else {example.with_suffix(".png").name})
    for picture in drawn:
        assert plt.imread(tmp_path / picture).std() > 0.05  # Something is drawn.


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 80


def code_lines(source: str) -> int:
    """Lines that are neither blank, nor a comment, nor part of the docstring or of an import."""
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    skipped = {line for node in [tree.body[0], *imports] for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        number not in skipped and not line.strip().startswith("#") and bool(line.strip()) for number, line in lines
    )


@pytest.mark.parametrize("example", OWN, ids=lambda path: path.name)
def test_your_own_is_twenty_lines(example: Path) -> None:
    assert code_lines(example.read_text(encoding="utf-8")) <= 20


def test_every_example_is_in_the_docs() -> None:
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("index.md", "examples.md")]
    assert EXAMPLES and all(f"(../examples/{example.name})" in page for example in EXAMPLES for page in pages)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 9 and len(OWN) >= 3
