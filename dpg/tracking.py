"""A run's figures in the tracker a person uses, besides `metrics.jsonl`."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpg.records import Record

Track = Callable[[Record], None]


def refuse_missing(name: str) -> None:
    """Raise a ValueError if the package of a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"track={name} needs the package {name}: pip install {name}.")


@contextmanager
def tracker(name: str, path: Path, config: dict[str, Any]) -> Iterator[Track]:
    """A function that shows a record in `name`: tensorboard (in the run folder), trackio, wandb, or none."""
    if name == "none":
        yield lambda record: None
        return
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(path / "tensorboard")) as writer:

            def write(record: Record) -> None:
                for key, value in figures(record).items():
                    writer.add_scalar(key, value, record.step)

            yield write
        return
    service = importlib.import_module(name)
    service.init(project="dpg", name=path.name, config=config)
    try:
        yield lambda record: service.log(figures(record), step=record.step)
    finally:
        service.finish()


def figures(record: Record) -> dict[str, float]:
    """Every number of a record, by the names of `metrics.jsonl`."""
    named = {"phi": record.phi, "reward_std": record.reward_std, "seconds": record.seconds, "kl": record.kl}
    named |= record.measures | {f"val/{name}": value for name, value in (record.validation or {}).items()}
    return {name: value for name, value in named.items() if value is not None}
