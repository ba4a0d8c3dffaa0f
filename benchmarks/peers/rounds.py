"""All contenders of one case by turns, and what was measured."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from benchmarks.peers.cases import Case
from benchmarks.peers.contenders import METRIC, OURS, PLAIN, Named
from benchmarks.peers.worker import Failed, Measured, Settings, Worker

TOLERANCE = 1e-3  # of the gradients, in float32: a run of many steps amplifies rounding


@dataclass
class Entry:
    """One contender's turns: the first, in which it may compile, and one for each round; or why there are none."""

    name: str
    turns: list[Measured] = field(default_factory=list)
    failure: str | None = None

    @property
    def first_seconds(self) -> float:
        return self.turns[0].seconds

    @property
    def seconds(self) -> list[float]:
        return [turn.seconds for turn in self.turns[1:]]

    @property
    def peak_mb(self) -> float:
        return median(turn.peak_mb for turn in self.turns[1:])

    @property
    def gradient(self) -> Tensor | None:
        """That of the first turn; None where there is none."""
        values = self.turns[0].gradient if self.failure is None else None
        return None if values is None else torch.tensor(values)


@dataclass(frozen=True)
class Comparison:
    """The entries of one case."""

    case: Case
    num_parameters: int
    entries: list[Entry]

    def ratios(self, entry: Entry) -> list[float] | None:
        """Times of plain training, round by round; None without both."""
        return self._over_plain(entry, lambda each: each.seconds)

    def cpu_ratios(self, entry: Entry) -> list[float] | None:
        """The same of the time that processors spent, to which other work on the machine adds little."""
        return self._over_plain(entry, lambda each: [turn.cpu_seconds for turn in each.turns[1:]])

    def ratios_without_metric(self, entry: Entry) -> list[float] | None:
        """The same less the gradient of the metric, as it was timed in the same round; None where it has no part."""
        ratios, metric = self.ratios(entry), self._by_name(METRIC)
        subtracted = None if metric is None else self.ratios(metric)
        if ratios is None or subtracted is None or entry.gradient is None:
            return None
        return [ratio - less for ratio, less in zip(ratios, subtracted, strict=True)]

    def error(self, entry: Entry) -> float | None:
        """‖gradient − ours‖ / ‖ours‖; None without both."""
        ours = self._by_name(OURS)
        if ours is None or ours.gradient is None or entry.gradient is None:
            return None
        return float((entry.gradient - ours.gradient).norm() / ours.gradient.norm())

    def _over_plain(self, entry: Entry, times: Callable[[Entry], list[float]]) -> list[float] | None:
        plain = self._by_name(PLAIN)
        if entry.failure is not None or plain is None:
            return None
        return [own / base for own, base in zip(times(entry), times(plain), strict=True)]

    def _by_name(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name and entry.failure is None), None)


def compare(case: Case, contenders: Sequence[Named], settings: Settings, num_rounds: int) -> Comparison:
    """Every contender once, to compile and to compare gradients; then in rounds, every other one backwards."""
    turns: list[tuple[Entry, Worker]] = []
    with ExitStack() as stack:
        for contender in contenders:
            # Started one after the other: nothing else runs beside an attempt.
            entry, worker = Entry(contender.name), Worker(contender.prepare, case, settings)
            stack.callback(worker.stop)
            turns.append((entry, worker))
            _take(entry, worker.turn(0.0))
        for number in range(num_rounds):
            for entry, worker in turns if number % 2 == 0 else reversed(turns):
                if entry.failure is None:
                    _take(entry, worker.turn(settings.turn_seconds))
    return Comparison(case, _num_parameters(case), [entry for entry, _ in turns])


def _take(entry: Entry, answer: Measured | Failed) -> None:
    if isinstance(answer, Failed):
        entry.failure = answer.reason
    else:
        entry.turns.append(answer)


def _num_parameters(case: Case) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in case.model.build().parameters())
