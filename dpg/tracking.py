"""A run's figures in the tracker a person uses, besides `metrics.jsonl`."""

import importlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpg.records import Record

PROJECT = "dpg"
"""Of trackio, and of wandb where WANDB_PROJECT names no other."""

Track = Callable[[Record], None]


def refuse_missing(name: str) -> None:
    """Raise a ValueError if the package of a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"track={name} needs the package {name}: pip install {name}.")


@contextmanager
def tracker(name: str, path: Path, config: dict[str, Any], first_step: int = 0) -> Iterator[Track]:
    """A function that shows a record in `name`: tensorboard (in the run folder), trackio, wandb, or none.

    Args:
        path: the run folder, after which the run is named.
        config: what the run was made with.
        first_step: of the records to come. Where it is above 0 the tracker's own run of this folder goes on, and what
            it has of later steps, which a kill has undone, is shown no more (tensorboard) or comes again.
    """
    opened = {"none": _nowhere, "tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[name]
    with opened(path, config, first_step) as track:
        yield track


def figures(record: Record) -> dict[str, float]:
    """Every number of a record, by the names of `metrics.jsonl`."""
    names = ("phi", "reward_std", "seconds", "num_tokens", "kl")
    named = {name: getattr(record, name) for name in names}
    named |= record.measures | {f"val/{name}": value for name, value in (record.validation or {}).items()}
    return {name: value for name, value in named.items() if value is not None}


@contextmanager
def _nowhere(path: Path, config: dict[str, Any], first_step: int) -> Iterator[Track]:
    yield lambda record: None


@contextmanager
def _tensorboard(path: Path, config: dict[str, Any], first_step: int) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path / "tensorboard"), purge_step=first_step or None) as writer:
        if first_step == 0:
            rows = "\n".join(f"| {key} | `{value}` |" for key, value in config.items())
            writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}", 0)

        def write(record: Record) -> None:
            for key, value in figures(record).items():
                writer.add_scalar(key, value, record.step)
            writer.flush()  # Seen while the run goes on, and there after a kill.

        yield write


@contextmanager
def _trackio(path: Path, config: dict[str, Any], first_step: int) -> Iterator[Track]:
    import trackio

    # By its name, and so another one where a folder of the same name was tracked before.
    how = "allow" if first_step else "never"
    trackio.init(PROJECT, name=path.name, config=config, resume=how)
    try:
        yield lambda record: trackio.log(figures(record), step=record.step)
    finally:
        trackio.finish()


@contextmanager
def _wandb(path: Path, config: dict[str, Any], first_step: int) -> Iterator[Track]:
    import wandb

    folder = {} if "WANDB_DIR" in os.environ else {"dir": str(path)}
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=path.name, config=config, id=_id(path), resume="allow", **folder)
    status = 1
    try:
        yield lambda record: run.log(figures(record), step=record.step)
        status = 0
    finally:
        run.finish(exit_code=status)


def _id(path: Path) -> str:
    """The name under which wandb knows the run of a folder, made once."""
    file = path / "wandb-id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()
