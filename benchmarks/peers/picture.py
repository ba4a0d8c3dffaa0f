"""The same as a picture: times of plain training and peak memory, one line for each case."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.peers.contenders import CONTENDERS, METRIC
from benchmarks.peers.rounds import Comparison, Entry

NAMES = [contender.name for contender in CONTENDERS if contender.name != METRIC]
MARKERS = dict(zip(NAMES, "os^vpD*dPX", strict=True))


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write the picture to `path`."""
    matplotlib.use("agg")
    figure = Figure(figsize=(12, 1.6 + 0.5 * len(comparisons)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(NAMES):
        # A little above and below the line of the case, so that equal numbers do not hide each other.
        offset = 0.6 * (number / (len(NAMES) - 1) - 0.5)
        found = [
            (row + offset, comparison, entry)
            for row, comparison in enumerate(comparisons)
            for entry in comparison.entries
            if entry.name == name and entry.failure is None
        ]
        _times(times, name, found)
        heights, peaks = [height for height, *_ in found], [entry.peak_mb for *_, entry in found]
        memory.plot(peaks, heights, MARKERS[name], color=f"C{number}")
    times.set_yticks(range(len(comparisons)), [str(comparison.case) for comparison in comparisons])
    times.invert_yaxis()
    times.set_xlabel("time, in times of plain training (lines: from the shortest to the longest round)")
    memory.set_xlabel("peak memory above the start, MB")
    for axes in (times, memory):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", which="both", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(NAMES))
    figure.savefig(path, dpi=120)


def _times(axes: Axes, name: str, found: Sequence[tuple[float, Comparison, Entry]]) -> None:
    color, label = f"C{NAMES.index(name)}", name
    for height, comparison, entry in found:
        if (ratios := comparison.ratios(entry)) is not None:
            axes.plot([min(ratios), max(ratios)], [height, height], color=color, linewidth=1)
            axes.plot(median(ratios), height, MARKERS[name], color=color, label=label)
            label = "_"  # A name stands in the legend once.
