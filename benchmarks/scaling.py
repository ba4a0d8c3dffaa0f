"""How the time and the memory of a metagradient grow with steps, examples, parameters, metrics and micro-batches.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py build/scaling

Writes scaling.json and scaling.png into the folder, and prints a table. Times are medians of three, in units of plain
training of the same steps beside it; memory is the peak of a process of its own, above what it held before. The model
is that of docs/theory.md, section 6.
"""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from cost import (
    Case,
    Task,
    Transformer,
    differentiate,
    model_cost,
    peak_of_this_process,
    seconds,
    train_plainly,
    transformer,
)
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import metagrad as mg

REPEATS = 3


@dataclass(frozen=True)
class Point:
    """One run."""

    num_steps: int = 8
    num_slots: int | None = None
    num_examples: int = 8
    width: int = 128
    num_metrics: int = 1
    num_pieces: int = 1

    @property
    def case(self) -> Case:
        """What is run, on `task`."""
        schedule = mg.EveryStep() if self.num_slots is None else mg.Binomial(self.num_slots)
        return Case(self.num_steps, schedule, self.num_metrics, self.num_pieces)

    @property
    def task(self) -> Task:
        """The model, its loss and its batch."""
        base = transformer(self.num_examples)
        model = Transformer(width=self.width)

        def losses(params: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
            logits = functional_call(model, params, batch["x"])
            return cross_entropy(logits.transpose(1, 2), batch["y"], reduction="none").mean(1)

        return base._replace(model=model, losses=losses)

    def model(self) -> float:
        """Forward passes over those of plain training, the gradients of the metrics among them."""
        if self.num_steps > 1:
            return model_cost(self.case)
        # One step: its gradient, (6), the metric's value before it, and the metric's gradient.
        return (3 + 2 + 1 + 3) / 3


@dataclass(frozen=True)
class Axis:
    """Points that differ in one thing."""

    name: str
    field: str
    values: tuple[int, ...]
    base: Point = Point()

    def points(self) -> Iterator[tuple[int, Point]]:
        """Each value with its point."""
        for value in self.values:
            yield value, replace(self.base, **{self.field: value})


AXES = [
    Axis("steps, all states kept", "num_steps", (1, 2, 4, 8, 16, 32)),
    Axis("steps, 8 slots", "num_steps", (8, 16, 32, 64), Point(num_slots=8)),
    Axis("examples in a batch", "num_examples", (4, 8, 16, 32, 64), Point(num_steps=4)),
    Axis("width of the model", "width", (64, 128, 256, 512), Point(num_steps=4)),
    Axis("metrics", "num_metrics", (1, 2, 4, 8), Point(num_steps=4)),
    Axis("micro-batches", "num_pieces", (1, 2, 4, 8), Point(num_steps=4, num_examples=32)),
]


def measured(point: Point) -> tuple[float, float, float]:
    """The ratio of times, its spread, and megabytes; called in a process of its own."""
    task, case = point.task, point.case
    small = replace(point, num_examples=point.num_pieces, num_steps=2)
    differentiate(small.task, small.case)
    before = peak_of_this_process()
    differentiate(task, case)
    megabytes = peak_of_this_process() - before
    train_plainly(task, case)  # The first time also pays for what torch sets up once.
    ratios = []
    for _ in range(REPEATS):
        plain = seconds(partial(train_plainly, task, case))
        ratios.append(seconds(partial(differentiate, task, case)) / plain)
    return median(ratios), max(ratios) - min(ratios), megabytes


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for axis in AXES:
        print(f"\n| {axis.name} | times plain training | spread | model | MB |\n|---|---|---|---|---|")
        for value, point in axis.points():
            ratio, spread, megabytes = alone(measured, point)
            rows.append({"axis": axis.name, "value": value, **asdict(point), "ratio": ratio, "spread": spread})
            rows[-1] |= {"model": point.model(), "megabytes": megabytes}
            print(f"| {value} | {ratio:.2f} | {spread:.2f} | {point.model():.2f} | {megabytes:.0f} |", flush=True)
    (folder / "scaling.json").write_text(json.dumps(rows, indent=1))
    _draw(rows, folder / "scaling.png")


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(2, len(AXES), figsize=(3 * len(AXES), 5.5), layout="constrained")
    for column, axis in enumerate(AXES):
        own = [row for row in rows if row["axis"] == axis.name]
        values = [row["value"] for row in own]
        top, bottom = panels[0][column], panels[1][column]
        top.errorbar(
            values, [row["ratio"] for row in own], [row["spread"] / 2 for row in own], fmt="o-", label="measured"
        )
        top.plot(values, [row["model"] for row in own], "--", color="gray", label="counted in products")
        bottom.plot(values, [row["megabytes"] for row in own], "s-", color="tab:red")
        for panel in (top, bottom):
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [str(value) for value in values])
            panel.set_ylim(bottom=0)
        top.set_title(axis.name, fontsize=10)
    panels[0][0].set_ylabel("time, in plain trainings")
    panels[0][0].legend(fontsize=8)
    panels[1][0].set_ylabel("peak memory, MB")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/scaling"))
