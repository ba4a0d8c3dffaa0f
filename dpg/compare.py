"""A table of variants and seeds for one experiment: which reward does how much, and is it more than chance."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.progress import track

from dpg.folder import RunFolder, RunFolderError
from dpg.preset import Preset
from dpg.pretrain import multilingual_models
from dpg.table import table, words
from dpg.verify import SOURCES, ordinary_trial

CONTROLS = ("untrained generator", "real prose", "shuffled", "random", "naive")
"""Rows that metagradients must beat."""

NUM_SDS = 2.0
"""By how many pooled standard deviations a variant has to be above the best control; fixed before any run."""


@dataclass(frozen=True)
class Row:
    """One variant: the values of a figure, one for each seed."""

    name: str
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values)

    @property
    def sd(self) -> float:
        """Over seeds, with one degree of freedom taken for the mean; NaN for one seed."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


def compare(preset: Preset, variants: Sequence[str], seeds: Sequence[int], path: Path, *, jobs: int = 1) -> list[Row]:
    """Run every variant with every seed that is not there yet, and write `table.md`, `table.json` and `plot.png`.

    Each run has a folder of its own in `path` and one thread. All rows are judged alike: a fresh target is fine-tuned
    on the run's data with plain `torch.optim` and the settings of `preset`.

    Args:
        preset: what every run has in common.
        variants: names in `preset.variants`.
        seeds: of the runs.
        path: a folder; a second call with the same arguments goes on where a first one ended.
        jobs: runs at a time.

    Raises:
        ValueError: for an unknown variant.
        RunFolderError: if `path` is of another comparison, or a run fails.
    """
    if unknown := [name for name in variants if name not in preset.variants]:
        raise ValueError(f"there is no variant {unknown[0]!r}. Choose from: {', '.join(preset.variants)}.")
    if not variants or not seeds or jobs < 1:
        raise ValueError(f"{len(variants)} variants, {len(seeds)} seeds and {jobs} jobs: none may be less than 1.")
    changed = {name: preset.changed(preset.variants[name]) for name in variants}  # An error comes before any run.
    _claim(path, preset)
    if "multilingual" in (preset.settings.generator, preset.settings.target):
        multilingual_models()  # Once, and not by every job.
    runs = {(name, seed): changed[name].changed({"seed": seed}) for name in variants for seed in seeds}
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(_run, path / f"{name}-{seed}", run) for (name, seed), run in runs.items()]
        try:
            for done in track(as_completed(started), "runs", total=len(started)):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = _rows(path, preset, variants, seeds)
    write(path, preset, rows)
    return rows


def best_control(rows: Sequence[Row]) -> Row | None:
    """The control with the highest mean."""
    return max((row for row in rows if row.name in CONTROLS), key=lambda row: row.mean, default=None)


def pooled_sd(left: Row, right: Row) -> float:
    """The root of the two variances' mean, weighted by degrees of freedom; NaN without any."""
    freedoms = [len(row.values) - 1 for row in (left, right)]
    if not sum(freedoms):
        return math.nan
    parts = (freedom * row.sd**2 for freedom, row in zip(freedoms, (left, right), strict=True) if freedom)
    return math.sqrt(sum(parts) / sum(freedoms))


def is_above(row: Row, control: Row) -> bool:
    """Whether the rule holds: above the control by more than `NUM_SDS` pooled standard deviations."""
    return row.mean - control.mean > NUM_SDS * pooled_sd(row, control)


def write(path: Path, preset: Preset, rows: Sequence[Row]) -> None:
    """The table, for people and for programs, and its picture."""
    figure, control = preset.experiment.figure, best_control(rows)
    lines = []
    for row in rows:
        cells = [row.name, f"{row.mean:.6g}", _rounded(row.sd, ".2g"), len(row.values)]
        if row.name in CONTROLS or control is None:
            lines.append([*cells, "", ""])
            continue
        sd = pooled_sd(row, control)
        distance = (row.mean - control.mean) / sd if sd > 0 else math.nan
        verdict = "–" if math.isnan(sd) else "yes" if is_above(row, control) else "no"  # One seed each proves nothing.
        lines.append([*cells, _rounded(distance, ".1f"), verdict])
    name = "none" if control is None else control.name
    head = ["reward", words(figure), "sd", "seeds", "pooled sd above", f"more than {NUM_SDS:g}"]
    page = (
        f"# {preset.experiment.name}: {words(figure)} after an ordinary fine-tune\n\n{table(head, lines)}\n\n"
        f"The best control is: {name}. The rule, fixed beforehand: a variant counts if its mean is above that of the "
        f"best control by more than {NUM_SDS:g} pooled standard deviations over seeds.\n\n![the table](plot.png)\n"
    )
    folder = RunFolder(path)
    folder.write_text("table.md", page)
    folder.write_json("table.json", {"figure": figure, "rows": {row.name: list(row.values) for row in rows}})
    _draw(path, figure, rows)


def _rounded(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _draw(path: Path, figure: str, rows: Sequence[Row]) -> None:
    matplotlib.use("agg")
    drawing = Figure(figsize=(6.4, 0.4 * len(rows) + 1), layout="constrained")
    axes = drawing.subplots()
    for place, row in enumerate(reversed(rows)):
        colour = "grey" if row.name in CONTROLS else "C0"
        axes.plot(row.values, [place] * len(row.values), "o", color=colour, alpha=0.5, ms=4)
        axes.errorbar(row.mean, place, xerr=0 if math.isnan(row.sd) else row.sd, fmt="|", color=colour, capsize=3)
    axes.set(yticks=range(len(rows)), yticklabels=[row.name for row in reversed(rows)], xlabel=words(figure))
    drawing.savefig(path / "plot.png", dpi=150)


def _claim(path: Path, preset: Preset) -> None:
    """Make `path` the folder of this comparison."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "preset.yaml"
    if file.exists() and file.read_text(encoding="utf-8") != preset.text():
        raise RunFolderError(f"{path} holds a comparison with other settings ({file}). Pass another folder with --out.")
    RunFolder(path).write_text("preset.yaml", preset.text())


def _run(path: Path, preset: Preset) -> None:
    """Start, continue or skip one run, in a process of its own."""
    if (path / "report.md").exists():
        return
    file, log_file = (path.with_name(f"{path.name}.{kind}") for kind in ("yaml", "log"))
    file.write_text(preset.text(), encoding="utf-8")
    resume = ["--resume"] if (path / "checkpoint.pt").exists() else []
    if not resume and (path / "config.json").exists():
        for left in sorted(path.rglob("*"), reverse=True):  # A run killed before its first checkpoint.
            left.rmdir() if left.is_dir() else left.unlink()
    command = [sys.executable, "-m", "dpg.cli", "run", preset.experiment.name, "--preset", file, "--out", path]
    # One thread: several runs with several threads each would spin against one another.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log_file.open("a") as log:
        done = subprocess.run([*command, *resume], stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = log_file.read_text().splitlines()[-1:]
        raise RunFolderError(f"{path} failed: {' '.join(last)}. The rest of it is in {log_file}.")


def _rows(path: Path, preset: Preset, variants: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    figure = preset.experiment.figure

    def values(name: str, file: str) -> list[float]:
        return [_figures(path / f"{name}-{seed}", file, preset.changed({"seed": seed}))[figure] for seed in seeds]

    rows = [Row(name, values(name, "dataset.jsonl")) for name in variants]
    controls = {name: file for name, file in SOURCES.items() if name in CONTROLS}
    return rows + [Row(name, values(variants[0], file)) for name, file in controls.items()]


def _figures(path: Path, file: str, preset: Preset) -> Mapping[str, Any]:
    """The figures of a target trained on the texts of one file of a run, kept beside it once they are known."""
    kept = path / f"ordinary-{Path(file).stem}.json"
    if not kept.exists():
        figures = ordinary_trial(path, RunFolder(path).read_texts(file), preset)
        RunFolder(path).write_json(kept.name, figures)
    return json.loads(kept.read_text())
