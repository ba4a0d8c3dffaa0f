"""What a study of the rewards' truth found, as tables and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from dpg.agreement import Agreement, Interval
from dpg.folder import RunFolder
from dpg.table import table

FIGURES = ("pearson", "spearman", "slope")


class Cell(NamedTuple):
    """What was found with the texts of one GRPO step, one number of inner steps and one learning rate.

    Attributes:
        left_out: Φ(1) − Φ(w_i = 0) for several texts i, against r_i.
        changed: Φ(1 + δ) − Φ(1) for several random δ, against Σ r_i δ_i.
        smoothness: S of `metagrad.check.metasmoothness`, its mean over directions.
    """

    step: int
    inner_steps: int
    lr: float
    phi: float
    left_out: Agreement
    changed: Agreement
    smoothness: Interval

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "left_out": self.left_out.as_dict(), "changed": self.changed.as_dict()}


def write(folder: RunFolder, title: str, cells: Sequence[Cell], own: tuple[int, float]) -> None:
    """Write `fidelity.md` and `fidelity.png`; `own` are the run's own number of inner steps and learning rate."""
    folder.write_text("fidelity.md", _page(title, cells))
    _draw(folder.path / "fidelity.png", cells, own)


def summary(cells: Sequence[Cell]) -> str:
    """A table of the lowest and highest figures over the marks."""
    rows = []
    for kind in dict.fromkeys((cell.inner_steps, cell.lr) for cell in cells):
        chosen = [cell for cell in cells if (cell.inner_steps, cell.lr) == kind]
        found = [[getattr(c.left_out, name) for c in chosen] for name in FIGURES]
        found += [[getattr(c.changed, name) for c in chosen] for name in FIGURES]
        rows.append([kind[0], f"{kind[1]:g}", *map(_range, [*found, [c.smoothness for c in chosen]])])
    names = [f"{name.capitalize()}, {what}" for what in ("one left out", "all changed") for name in FIGURES]
    return table(["inner steps", "lr", *names, "S"], rows)


def _range(found: Sequence[Interval | None]) -> str:
    values = [each.value for each in found if each is not None]
    return f"{min(values):.3f} to {max(values):.3f}" if len(values) == len(found) else "–"


def _page(title: str, cells: Sequence[Cell]) -> str:
    tables = {}
    for name in ("left_out", "changed"):
        rows = []
        for cell in cells:
            found = [getattr(getattr(cell, name), figure) for figure in FIGURES]
            known = ["–" if each is None else str(each) for each in [*found, cell.smoothness]]
            rows.append([cell.step, cell.inner_steps, f"{cell.lr:g}", f"{cell.phi:.6g}", *known])
        tables[name] = table(["GRPO step", "inner steps", "lr", "Φ", *map(str.capitalize, FIGURES), "S"], rows)
    return f"""# Are the rewards true? {title}

Each row is a target trained on texts of the generator after so many GRPO steps, in float64. In brackets are 95 %
intervals: bootstrap for correlations and slopes (1 if predictions are exact), Student's t for metasmoothness S. "–"
stands where the changes do not vary beyond rounding.

## Over the whole run, lowest to highest

{summary(cells)}

## One text left out: Φ(1) − Φ(w_i = 0) against r_i

{tables["left_out"]}

## All weights changed at random: Φ(1 + δ) − Φ(1) against Σ r_i δ_i

{tables["changed"]}

![predicted and true changes, and their correlation along the run](fidelity.png)
"""


def _draw(path: Path, cells: Sequence[Cell], own: tuple[int, float]) -> None:
    """Leave-one-out at the run's `own` settings, mark by mark, above the correlations at all settings."""
    matplotlib.use("agg")
    marks = [cell for cell in cells if (cell.inner_steps, cell.lr) == own]
    drawing = Figure(figsize=(2.3 * len(marks), 5.2), layout="constrained")
    above, below = drawing.subfigures(2, 1, height_ratios=(1, 1.2))
    above.suptitle(f"Φ(1) − Φ(w_i = 0), T = {own[0]}, lr {own[1]:g}", fontsize="medium")
    for axes, cell in zip(above.subplots(1, len(marks), squeeze=False)[0], marks, strict=True):
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        axes.scatter(cell.left_out.predicted, cell.left_out.true, s=8, alpha=0.6, linewidths=0)
        axes.set_title(f"step {cell.step}", fontsize="medium")
        axes.set(xlabel="reward", ylabel="true change" if cell is marks[0] else None)
        axes.ticklabel_format(scilimits=(0, 0))
    lrs, numbers = (sorted({getattr(cell, name) for cell in cells}) for name in ("lr", "inner_steps"))
    panels = dict(zip(("left_out", "changed"), below.subplots(1, 2, sharey=True), strict=True))
    for (name, axes), title in zip(panels.items(), ("one text left out", "all weights changed"), strict=True):
        for number, lr in dict.fromkeys((cell.inner_steps, cell.lr) for cell in cells):
            line = [cell for cell in cells if (cell.inner_steps, cell.lr) == (number, lr)]
            found = [(cell.step, getattr(cell, name).pearson) for cell in line]
            known = [(step, pearson.value) for step, pearson in found if pearson is not None]
            if not known:
                continue
            style = {"color": f"C{lrs.index(lr)}", "linestyle": ["-", "--", ":", "-."][numbers.index(number) % 4]}
            axes.plot(*zip(*known, strict=True), marker="o", ms=3, label=f"T = {number}, lr {lr:g}", **style)
        axes.set(title=title, xlabel="GRPO step", ylabel="Pearson's correlation" if name == "left_out" else None)
    below.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    drawing.savefig(path, dpi=100)
