"""`metagrad` stands alone, and its modules import one way only."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import metagrad

ROOT = Path(metagrad.__file__).parent


def imported_by(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from metagrad import x` counts as metagrad.x."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names.update(
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "metagrad" else [node.module]
            )
    return names


def dotted(path: Path) -> str:
    """A module's name inside metagrad; a package's name is that of its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): imported_by(path) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}
OURS = {
    name: {i.removeprefix("metagrad.") for i in imports if i.startswith("metagrad.")}
    for name, imports in MODULES.items()
}


def reached_from(name: str) -> set[str]:
    """All modules of ours that a module needs, directly or not."""
    return OURS[name].union(*(reached_from(other) for other in OURS[name]))


def test_metagrad_imports_no_application():
    code = "import metagrad, sys; print(*{'transformers', 'datasets', 'dpg', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == ""


def test_imports_form_no_cycle():
    TopologicalSorter(OURS).prepare()  # raises a CycleError
    assert reached_from("_tree") == {"_types"}


def test_optimizers_know_no_step():
    assert not reached_from("optim") & {"_step", "_loss", "_replay", "_gradient", "check"}


@pytest.mark.parametrize("name", ["_plan", "_schedule", "_hierarchy"])
def test_planning_knows_no_tensor(name):
    assert OURS[name] <= {"_plan", "_schedule"}
    assert {module.split(".")[0] for module in MODULES[name]} <= sys.stdlib_module_names | {"metagrad"}


def test_the_referee_does_not_play():
    assert not reached_from("check") & {"_replay", "_gradient", "_schedule", "_store", "_curvature"}


def test_the_replay_knows_neither_step_nor_loss():
    assert reached_from("_replay") <= {"_plan", "_progress", "_store", "_tree", "_types", "_witness"}


def test_every_public_name_exists():
    assert all(hasattr(metagrad, name) for name in metagrad.__all__)
