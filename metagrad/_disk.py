"""States on disk, written in the background and read one ahead."""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from metagrad._files import Blueprint, read_tree, write_tree
from metagrad._store import Bytes, Kept, Store, refuse_second
from metagrad._tree import num_bytes


class _Reading(NamedTuple):
    step: int
    kept: Future[Kept]


class DiskStore(Store):
    """States in a folder, a checksummed safetensors file each, whole or absent.

    One state is written while training goes on, and the one needed next is read ahead: no more is held in RAM.

    Args:
        folder: made if absent. It must hold no states yet, but those of `left`.
        left: files that an earlier process wrote, by step, and `like` what they hold. Where they are given, a later
            process is to find what is written now: it is on the disk before it counts.

    Raises:
        ValueError: if the folder holds states of another run.
        OSError: at a later call, if a state could not be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], left: Mapping[int, Path] | None = None, like: Blueprint | None = None
    ) -> None:
        self.folder, self._durable = Path(folder), left is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._paths = dict(left or {})
        if found := min(set(self.folder.glob("state-*.safetensors")) - set(self._paths.values()), default=None):
            raise ValueError(
                f"{self.folder} already holds states, such as {found.name}. Name an empty folder; to continue a run "
                "that was cut off, call metagradient(..., resume=folder) instead."
            )
        self._worker: ThreadPoolExecutor | None = None
        self._like = {step: like for step in self._paths} if like is not None else {}
        self._writing: tuple[int, int, Future[Path]] | None = None  # step, bytes in RAM, path to come
        self._reading: _Reading | None = None
        self._sizes = {step: path.stat().st_size for step, path in self._paths.items()}
        self._num_bytes = sum(self._sizes.values())
        self._beside = 0
        self._peak = Bytes(0, 0)

    @property
    def steps(self) -> list[int]:
        """The steps of the states that are on disk, ascending."""
        return sorted(self._paths)

    def put(self, kept: Kept) -> None:
        self._finish_writing()
        step = kept.state.step
        refuse_second(step, self._paths)
        self._like[step] = Blueprint.of(kept)
        name = f"state-{step:08d}"
        written = self._working().submit(write_tree, self.folder, name, kept, durable=self._durable)
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
            self._reading = _Reading(step, self._working().submit(read_tree, self._paths[step], self._like[step]))
            self._count()

    def drop(self, step: int) -> None:
        self._finish_writing()
        self._paths.pop(step).unlink()
        self._num_bytes -= self._sizes.pop(step)
        del self._like[step]
        if self._reading is not None and self._reading.step == step:
            self._reading = None

    def beside(self, num_bytes: int) -> None:
        """Count so many bytes of other files on the same disk, from now on."""
        self._beside = num_bytes
        self._count()

    def close(self) -> None:
        try:
            self._finish_writing()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
            self._worker = self._reading = None

    @property
    def peak_bytes(self) -> Bytes:
        return self._peak

    def _working(self) -> ThreadPoolExecutor:
        """The thread that copies; a new one after `close`, so that the store can be used again."""
        self._worker = self._worker or ThreadPoolExecutor(max_workers=1)
        return self._worker

    def _finish_writing(self) -> None:
        if self._writing is not None:
            (step, _, written), self._writing = self._writing, None
            self._paths[step] = path = written.result()
            self._sizes[step] = path.stat().st_size
            self._num_bytes += self._sizes[step]

    def _count(self) -> None:
        writing = 0 if self._writing is None else self._writing[1]
        reading = 0 if self._reading is None else num_bytes(self._like[self._reading.step].tree)
        disk = writing + self._num_bytes + self._beside
        self._peak = Bytes(max(self._peak.ram, writing + reading), max(self._peak.disk, disk))
