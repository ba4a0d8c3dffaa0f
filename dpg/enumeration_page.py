"""How the DPG gradient and the policy gradient compare: fitted exponents, tables and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure

from dpg.folder import RunFolder
from dpg.table import table

SMALL = 0.1
"""Exponents are fitted where lr / n is at most this: theory is an expansion in it."""


class Point(NamedTuple):
    """How the two gradients compare: the cosine of their angle, |DPG| / |∇J|, and |DPG − ∇J| / |∇J|."""

    optimizer: str
    num_steps: int
    lr: float
    num_texts: int
    cosine: float
    norm_ratio: float
    error: float


class Exponents(NamedTuple):
    """b and c in error ∝ lr^b · n^c, and the number of points they were fitted to."""

    lr: float
    num_texts: float
    num_points: int


def write(path: Path, points: Sequence[Point]) -> None:
    """Write `enumeration.json`, `.md` and `.png`."""
    folder = RunFolder(path)
    folder.write_json("enumeration.json", [point._asdict() for point in points])
    folder.write_text("enumeration.md", _page(points))
    _draw(path / "enumeration.png", points)


def exponents(points: Sequence[Point]) -> Exponents | None:
    """The powers of lr and n by least squares of logarithms, where lr / n is small; None if there is too little."""
    small = [point for point in points if point.lr / point.num_texts <= SMALL and point.error > 0]
    logs = torch.tensor([[1.0, math.log(p.lr), math.log(p.num_texts)] for p in small], dtype=torch.float64)
    if len(small) < 3 or int(torch.linalg.matrix_rank(logs)) < 3:
        return None
    errors = torch.tensor([[math.log(point.error)] for point in small], dtype=torch.float64)
    _, lr, num_texts = torch.linalg.lstsq(logs, errors).solution.flatten().tolist()
    return Exponents(lr, num_texts, len(small))


def summary(points: Sequence[Point]) -> str:
    """A table of the fitted exponents."""
    rows = []
    for (name, steps), chosen in _kinds(points).items():
        found = exponents(chosen)
        known = ["–", "–", 0] if found is None else [f"{found.lr:.2f}", f"{found.num_texts:.2f}", found.num_points]
        errors = [point.error for point in chosen]
        rows.append([name, steps, *known, f"{min(errors):.1e} to {max(errors):.1e}"])
    return table(["optimizer", "inner steps", "power of lr", "power of n", "points", "relative errors"], rows)


def _kinds(points: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    """The points of each optimizer and number of steps."""
    kinds = dict.fromkeys((point.optimizer, point.num_steps) for point in points)
    return {kind: [point for point in points if (point.optimizer, point.num_steps) == kind] for kind in kinds}


def _page(points: Sequence[Point]) -> str:
    sizes = sorted({point.num_texts for point in points})
    parts = []
    for figure, title, form in (
        ("error", "Relative error |DPG − ∇J| / |∇J|", ".1e"),
        ("cosine", "Cosine of the angle", ".5f"),
        ("norm_ratio", "|DPG| / |∇J|", ".4f"),
    ):
        rows = []
        for (name, steps), chosen in _kinds(points).items():
            for lr in sorted({point.lr for point in chosen}):
                found = {point.num_texts: format(getattr(point, figure), form) for point in chosen if point.lr == lr}
                rows.append([name, steps, f"{lr:g}", *(found.get(size, "") for size in sizes)])
        head = ["optimizer", "inner steps", "lr", *(f"n = {size}" for size in sizes)]
        parts.append(f"## {title}\n\n{table(head, rows)}\n")
    sections = "\n".join(parts)
    return f"""# Is the DPG gradient the policy gradient?

Both are summed over every data set of n draws that a generator of a few texts can write, in float64: no sampling error.

## Powers in error ∝ lr^b · n^c, where lr / n is at most {SMALL:g}

{summary(points)}

{sections}
![relative error against the number of texts](enumeration.png)
"""


def _draw(path: Path, points: Sequence[Point]) -> None:
    matplotlib.use("agg")
    kinds, lrs = _kinds(points), sorted({point.lr for point in points})
    drawing = Figure(figsize=(9, 5), layout="constrained")
    panels = drawing.subplots(2, len(kinds) // 2, sharex=True, sharey=True).T.flat
    for axes, ((name, steps), chosen) in zip(panels, kinds.items(), strict=True):
        for i, lr in enumerate(lrs):
            line = [(point.num_texts, point.error) for point in chosen if point.lr == lr]
            axes.plot(*zip(*line, strict=True), marker="o", ms=3, color=f"C{i}", label=f"lr {lr:g}")
        axes.set_title(f"{name}, T = {steps}", fontsize="medium")
        axes.set(xscale="log", yscale="log", xlabel="texts n" if steps == 2 else None)
    drawing.supylabel("relative error of the DPG gradient")
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    drawing.savefig(path, dpi=100)
