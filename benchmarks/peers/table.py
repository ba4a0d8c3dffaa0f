"""What was measured, as a table to read."""

from collections.abc import Sequence
from statistics import median

from benchmarks.peers.rounds import TOLERANCE, Comparison, Entry

HEAD = ["contender", "median s", "min", "max", "× plain", "less metric", "× CPU", "peak MB", "error", "first s"]
LEGEND = f"""\
* *median s, min, max*: wall time of training with states kept, the metric's gradient and the reverse pass; of plain
  training alone where the name says so. Contenders take turns, each in a process of its own; a turn is one attempt, or
  the median of several short ones.
* *× plain*: the median over the rounds of the time over that of plain training in the same round.
* *less metric*: the same after the time of *metric alone* in that round, one gradient of the metric, is subtracted.
* *× CPU*: *× plain* of the time that the processors spent on the process. Trust it where other work shares the machine.
* *peak MB*: resident memory at the most, above that of the process before the attempt (on a GPU: of its tensors);
  medians. bergson and *ours on disk* keep their states on disk, *ours* in RAM, *ours, graphs*, TorchOpt and higher the
  graphs of all steps.
* *keeps sqrt* means at most ⌈√T⌉ states for *ours* and the mode "sqrt" of bergson, which holds about 2√T; *8 slots*
  is the mode "log" there, about log₂T.
* *error*: of the gradient of the weights, relative to that of *ours*, in float32; above {TOLERANCE:g} it is reported.
* *first s*: the first attempt, not counted elsewhere. It includes compiling: cold the first time that a model and a
  number of micro-batches occur in a run of this program, from a cache after that."""


def table(comparison: Comparison) -> str:
    """A heading, one row for each contender, and what disagrees or failed."""
    rows = [_row(comparison, entry) for entry in comparison.entries if entry.failure is None]
    heading = f"## {comparison.case} ({comparison.num_parameters:,} parameters)"
    return "\n".join([heading, "", *_aligned([HEAD, *rows]), "", *_remarks(comparison)])


def _row(comparison: Comparison, entry: Entry) -> list[str]:
    seconds, error = entry.seconds, comparison.error(entry)
    return [
        entry.name,
        f"{median(seconds):.3f}",
        f"{min(seconds):.3f}",
        f"{max(seconds):.3f}",
        _ratio(comparison.ratios(entry)),
        _ratio(comparison.ratios_without_metric(entry)),
        _ratio(comparison.cpu_ratios(entry)),
        f"{entry.peak_mb:.0f}",
        "" if error is None else f"{error:.1e}",
        f"{entry.first_seconds:.1f}",
    ]


def _ratio(ratios: Sequence[float] | None) -> str:
    return "" if ratios is None else f"{median(ratios):.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose columns are aligned as text, too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "| " + " | ".join([first.ljust(widths[0]), *numbers]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(rows[0]), rule, *map(line, rows[1:])]


def _remarks(comparison: Comparison) -> list[str]:
    errors = {entry.name: comparison.error(entry) for entry in comparison.entries}
    compared = {name: error for name, error in errors.items() if error is not None}
    wrong = [f"{name} ({error:.1e})" for name, error in compared.items() if not error <= TOLERANCE]
    if wrong:
        verdict = f"* GRADIENTS DISAGREE with ours by more than {TOLERANCE:g}: {', '.join(wrong)}."
    elif len(compared) > 1:
        verdict = f"* All gradients agree within {max(compared.values()):.1e}."
    else:
        verdict = "* No two gradients to compare."
    failures = [f"* {entry.name}: {entry.failure}" for entry in comparison.entries if entry.failure is not None]
    return [verdict, *failures]
