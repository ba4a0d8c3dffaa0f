"""States on disk, written in the background and read one ahead."""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from metagrad._files import Blueprint, read_tree, write_tree
from metagrad._store import Bytes, Kept, Store
from metagrad._tree import num_bytes


class _Reading(NamedTuple):
    step: int
    kept: Future[Kept]


class DiskStore(Store):
    """States in a folder, a checksummed safetensors file each, whole or absent.

    One state is written while training goes on, and the one needed next is read ahead: no more is held in RAM.

    Args:
        folder: made if absent. It must hold no states yet, but those of `left`.
        left: files that an earlier process wrote, by step, and `like` what they hold.

    Raises:
        ValueError: if the folder holds states of another run.
        OSError: at a later call, if a state could not be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], left: Mapping[int, Path] | None = None, like: Blueprint | None = None
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._paths = dict(left or {})
        if found := next((f for f in self.folder.glob("state-*.safetensors") if f not in self._paths.values()), None):
            raise ValueError(
                f"{self.folder} already holds states, such as {found.name}. Name an empty folder; to continue a run "
                "that was cut off, call metagradient(..., resume=folder) instead."
            )
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._like = {step: like for step in self._paths} if like is not None else {}
        self._writing: tuple[int, int, Future[Path]] | None = None  # step, bytes in RAM, path to come
        self._reading: _Reading | None = None
        self._peak = Bytes(0, 0)

    @property
    def steps(self) -> list[int]:
        """The steps of the states that are on disk, ascending."""
        return sorted(self._paths)

    def put(self, kept: Kept) -> None:
        self._finish_writing()
        step = kept.state.step
        self._like[step] = Blueprint.of(kept)
        written = self._worker.submit(write_tree, self.folder, f"state-{step:08d}", kept)
        self._writing = (step, num_bytes(kept), written)
        self._count()

    def get(self, step: int) -> Kept:
        self.expect(step)
        assert self._reading is not None
        reading, self._reading = self._reading, None
        return reading.kept.result()

    def expect(self, step: int) -> None:
        if self._reading is None or self._reading.step != step:
            self._finish_writing()
            self._reading = _Reading(step, self._worker.submit(read_tree, self._paths[step], self._like[step]))
            self._count()

    def drop(self, step: int) -> None:
        self._finish_writing()
        self._paths.pop(step).unlink()
        del self._like[step]
        if self._reading is not None and self._reading.step == step:
            self._reading = None

    def close(self) -> None:
        self._finish_writing()
        self._worker.shutdown()

    @property
    def peak_bytes(self) -> Bytes:
        return self._peak

    def _finish_writing(self) -> None:
        if self._writing is not None:
            (step, _, written), self._writing = self._writing, None
            self._paths[step] = written.result()

    def _count(self) -> None:
        writing = 0 if self._writing is None else self._writing[1]
        reading = 0 if self._reading is None else num_bytes(self._like[self._reading.step].tree)
        disk = writing + sum(path.stat().st_size for path in self._paths.values())
        self._peak = Bytes(max(self._peak.ram, writing + reading), max(self._peak.disk, disk))
