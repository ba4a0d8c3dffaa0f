"""The same for programs: every number, and what it was measured with."""

import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.rounds import Comparison, Entry
from benchmarks.peers.worker import Settings

PACKAGES = ["torch", "transformers", "metagrad", "bergson", "torchopt", "higher"]


def machine(settings: Settings, num_rounds: int) -> dict[str, Any]:
    """What the times depend on besides the contenders. The load counts other work, too: it should be near 0."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else settings.device,
        "cores": os.cpu_count(),
        "threads": settings.num_threads,
        "memory limit in GB": settings.memory_gb if math.isfinite(settings.memory_gb) else None,
        "rounds": num_rounds,
        "seconds of a turn": settings.turn_seconds,
        "load before": os.getloadavg()[0],
    }


def record(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One entry for each case."""
    return [
        {
            "case": str(comparison.case),
            "model": comparison.case.model.name,
            "optimizer": comparison.case.optimizer,
            "num_steps": comparison.case.num_steps,
            "num_pieces": comparison.case.num_pieces,
            "kept": comparison.case.kept,
            "num_parameters": comparison.num_parameters,
            "contenders": [_entry(comparison, entry) for entry in comparison.entries],
        }
        for comparison in comparisons
    ]


def _entry(comparison: Comparison, entry: Entry) -> dict[str, Any]:
    if entry.failure is not None:
        return {"name": entry.name, "failure": entry.failure}
    return {
        "name": entry.name,
        "first_seconds": entry.first_seconds,
        "seconds": entry.seconds,
        "cpu_seconds": [turn.cpu_seconds for turn in entry.turns[1:]],
        "ratios": comparison.ratios(entry),
        "cpu_ratios": comparison.cpu_ratios(entry),
        "ratios_without_metric": comparison.ratios_without_metric(entry),
        "peak_mb": [turn.peak_mb for turn in entry.turns],
        "relative_error": comparison.error(entry),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
