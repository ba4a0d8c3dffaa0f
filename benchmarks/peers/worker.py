"""A contender in a process of its own, which makes attempts when it is its turn."""

import multiprocessing
import os
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.peers import memory
from benchmarks.peers.attempt import Attempt, Clock, Contender
from benchmarks.peers.cases import Case
from benchmarks.peers.tasks import Task

MAX_ATTEMPTS = 100  # of a turn


@dataclass(frozen=True)
class Settings:
    """What all processes have in common."""

    device: str
    num_threads: int
    memory_gb: float
    turn_seconds: float
    log: Path


class Measured(NamedTuple):
    """One turn: seconds of an attempt, peak of the process above its start in MB, gradient of the weights."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    gradient: list[float] | None


class Failed(NamedTuple):
    """Why there is nothing to measure."""

    reason: str


class Worker:
    """The parent's end of the process."""

    def __init__(self, prepare: Contender, case: Case, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, case, settings))
        self._process.start()
        theirs.close()

    def turn(self, seconds: float) -> Measured | Failed:
        """Attempts until they have taken `seconds` together, at least one."""
        try:
            self._connection.send(seconds)
            answer: Measured | Failed = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            return Failed(f"its process ended with exit code {self._process.exitcode}")
        return answer

    def stop(self) -> None:
        # The end of the pipe ends the loop.
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, prepare: Contender, case: Case, settings: Settings) -> None:
    with settings.log.open("a") as log:
        # Progress bars and warnings of the contenders.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print(f"\n{prepare.__name__}: {case}", flush=True)
    torch.set_num_threads(settings.num_threads)
    meter = memory.of(settings.device, settings.memory_gb)
    try:
        seconds = connection.recv()
        attempt = prepare(Task.of(case.model, case.num_steps, settings.device), case)
        while True:
            connection.send(_turn(attempt, seconds, meter))
            seconds = connection.recv()
    except EOFError:
        return
    except Exception as error:
        traceback.print_exc()
        first, *_ = str(error).splitlines() or [""]
        connection.send(Failed(f"{type(error).__name__}: {first}"))


def _turn(attempt: Attempt, at_least: float, meter: memory.Meter) -> Measured:
    """Medians of as many attempts as it takes: short ones would otherwise be measured worse than long ones."""
    clocks: list[Clock] = []
    peaks: list[float] = []
    meter.give_back()
    while not clocks or (sum(clock.seconds for clock in clocks) < at_least and len(clocks) < MAX_ATTEMPTS):
        start, clock = meter.restart_peak(), Clock()
        gradient = attempt(clock)
        clocks.append(clock)
        peaks.append(meter.peak() - start)
        # Also for those whose turn is next, so that they have room.
        meter.give_back()
    wall, processors = (median(times) for times in zip(*((c.seconds, c.cpu_seconds) for c in clocks), strict=True))
    return Measured(wall, processors, median(peaks), None if gradient is None else gradient.tolist())
