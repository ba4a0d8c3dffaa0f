"""A run's folder: everything that is needed to go on after a kill at any moment, in files that are whole or absent."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch

from metagrad._claim import claim, locked, of_rank, refuse_missing_files
from metagrad._disk import DiskStore
from metagrad._files import REMEDY, Blueprint, read_tree, write_tree
from metagrad._fingerprint import Fingerprint
from metagrad._plan import Plan, Save
from metagrad._ranks import Ranks
from metagrad._replay import Progress
from metagrad._store import Kept
from metagrad._tree import tensor_leaves
from metagrad._types import ResumeError, State, Tree
from metagrad._witness import Witness

Answer = TypeVar("Answer")
FILE = re.compile(r"(state|final|witness|reverse)-(\d{8})\.[0-9a-f]{8}\.safetensors")
PAUSE = 10
"""A bookmark is written when ten times as long has passed as the last one took: a tenth of the time at most."""


class RunFolder:
    """The journal of one run in a folder of its own.

    Files: `run.json`, what makes it this run; `state-t`, kept states and a bookmark of the forward run; `final-T`, the
    trained state; `witness-t`, the digests of the states up to t; `reverse-t`, what is known after reversing step t.

    Each of several processes has such a folder in the one that is named. They write, and delete what is older,
    together: whenever they are killed, there is a newest file of each kind that all of them have.

    Args:
        folder: made if absent.
        fingerprint: of the run.
        initial: the state before step 0.
        like: progress after the last step, for its shapes and types.
        wrt_params: whether the initial state has a cotangent at the end.
        ranks: the processes of the run.

    Attributes:
        store: where the plan's states are kept; those that an earlier process left are there.
        witness: the digests of that process.
        final: the trained state, if it came so far, and `progress`, how far it came backwards.

    Raises:
        ResumeError: if another process uses the folder, or it is damaged, or of another run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Fingerprint,
        initial: State,
        like: Progress,
        wrt_params: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self.folder = Path(folder)
        if ranks is not None:
            self.folder = ranks.agreed(lambda: of_rank(Path(folder), ranks), f"the folder {folder}")
        self._lock: int | None = None
        try:
            self._together(lambda: self._open(fingerprint))
            found = self._together(lambda: _files_by_kind(self.folder))
            if ranks is not None:
                of_ranks = ranks.gathered({kind: set(paths) for kind, paths in found.items()}, str(folder))
                refuse_missing_files(self.folder.parent, of_ranks)
                _keep_common(found, of_ranks)
            _keep_newest(found)
            self._together(lambda: self._read(found, initial, like, wrt_params))
        except BaseException:
            # Or the same process, corrected, would find the folder in use.
            self.close()
            raise
        self._planned: frozenset[int] = frozenset()
        # The newest file of each kind but the plan's states; the bookmark of a dead process is one of those by now.
        self._own = {kind: path for kind in ("final", "witness", "reverse") for path in found[kind].values()}
        self._pause = 0.0
        self._written_at = perf_counter()

    def _open(self, fingerprint: Fingerprint) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder)
        claim(self.folder, fingerprint)
        for unfinished in self.folder.glob("*.unfinished"):
            unfinished.unlink()

    def _read(self, found: dict[str, dict[int, Path]], initial: State, like: Progress, wrt_params: bool) -> None:
        self.store = DiskStore(self.folder, found["state"], Blueprint.of(Kept(initial, None)))
        self.witness = _read_witness(found["witness"], initial)
        self.final: State | None = None
        for path in found["final"].values():
            self.final = read_tree(path, Blueprint.of(initial))
        self.progress = _read_progress(found["reverse"], like, wrt_params)
        if self.progress is not None and self.final is None:
            raise ResumeError(f"{self.folder} holds no final-*.safetensors, the trained state, any more. {REMEDY}")

    def _together(self, act: Callable[[], Answer]) -> Answer:
        """What `act` returns, once it has not failed on any rank."""
        return act() if self._ranks is None else self._ranks.agreed(act, f"the folder {self.folder.parent}")

    def begin(self, plan: Plan) -> None:
        """Hear of the states that the forward run will keep anyway, which need no bookmark."""
        self._planned = frozenset(action.step for action in plan.forward if isinstance(action, Save))

    def stepped(self, state: State) -> None:
        """Now and then, and never where the plan keeps the state anyway: a bookmark of the forward run."""
        if state.step == 1 and "witness" not in self._own:
            # Before any state that a step led to is kept: it tells a later process whether its step is another.
            self._write("witness", state.step, self.witness.table(state.step))
        if self.final is None and state.step not in self._planned and self._due():
            # The digests first, so that there are always those of the newest state.
            self._write("witness", state.step, self.witness.table(state.step))
            self._write("state", state.step, Kept(state, None))

    def trained(self, state: State) -> None:
        """Keep the trained state, of which nothing else is left once the reverse pass has begun."""
        self._write("witness", state.step, self.witness.table(state.step))
        self._write("final", state.step, state)
        self.final = state
        if (bookmark := self._own.pop("state", None)) is not None:
            bookmark.unlink()
            self._count(self._own.values())

    def reversed(self, progress: Progress) -> None:
        """Now and then, and at the end: the cotangents and the gradients so far."""
        if progress.step == 0 or self._due():
            self._write("reverse", progress.step, as_tensors(progress))

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)

    def _due(self) -> bool:
        due = perf_counter() - self._written_at >= self._pause
        return due if self._ranks is None else bool(self._ranks.first(due, "whether to write"))

    def _write(self, kind: str, step: int, tree: Tree) -> None:
        start = perf_counter()
        path = self._together(lambda: write_tree(self.folder, f"{kind}-{step:08d}", tree))
        self._count({*self._own.values(), path})
        # The older one goes only now: at every moment there is one that is whole.
        if (older := self._own.get(kind)) is not None and older != path:
            older.unlink()
        self._own[kind] = path
        self._count(self._own.values())
        self._written_at = perf_counter()
        self._pause = PAUSE * (self._written_at - start)

    def _count(self, own: Iterable[Path]) -> None:
        self.store.beside(sum(path.stat().st_size for path in own))


def _files_by_kind(folder: Path) -> dict[str, dict[int, Path]]:
    """The files of a run by kind and step."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.glob("*.safetensors")):
        match = FILE.fullmatch(path.name)
        if match is None:
            raise ResumeError(f"{path} is damaged: no file of a run has such a name. {REMEDY}")
        found[match[1]][int(match[2])] = path
    return found


def _keep_common(found: dict[str, dict[int, Path]], of_ranks: Sequence[Mapping[str, set[int]]]) -> None:
    """Remove the files that some rank lacks: what was being written, or deleted, when the run was cut off."""
    for kind, paths in found.items():
        for step in [step for step in paths if not all(step in each.get(kind, ()) for each in of_ranks)]:
            paths.pop(step).unlink()


def _keep_newest(found: dict[str, dict[int, Path]]) -> None:
    """Remove those that a newer one has replaced."""
    newest: list[tuple[str, Callable[..., int]]] = [("witness", max), ("reverse", min)]
    for kind, choose in newest:
        for step in found[kind].keys() - ({choose(found[kind])} if found[kind] else set()):
            found[kind].pop(step).unlink()


def _read_witness(paths: dict[int, Path], initial: State) -> Witness:
    if not paths:
        return Witness()
    (step, path), *_ = paths.items()
    shape = (step + 1, len(tensor_leaves(initial)), 2)
    return Witness.of(read_tree(path, Blueprint.of(torch.empty(shape, dtype=torch.int64))))


def as_tensors(progress: Progress) -> Tree:
    """What a file of `progress` holds: values in float64, and NaN, which no metric may be, for one not yet met."""
    values = [torch.tensor(nan if v is None else float(v), dtype=torch.float64) for v in progress.values]
    return (values, progress.carried or [], progress.totals)


def _read_progress(paths: dict[int, Path], like: Progress, wrt_params: bool) -> Progress | None:
    if not paths:
        return None
    (step, path), *_ = paths.items()
    carried = None if step == 0 and not wrt_params else like.carried
    values, carried, totals = read_tree(path, Blueprint.of(as_tensors(like._replace(carried=carried))))
    known = [None if bool(v.isnan()) or w is None else v.to(w) for v, w in zip(values, like.values, strict=True)]
    return Progress(step, known, carried or None, totals)
