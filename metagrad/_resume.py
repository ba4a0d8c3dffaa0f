"""A run's folder: everything that is needed to go on after a kill at any moment, in files that are whole or absent."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from math import nan
from pathlib import Path
from time import perf_counter

import torch

from metagrad._disk import DiskStore
from metagrad._files import REMEDY, Blueprint, could_not_write, read_tree, sync_folder, write_tree
from metagrad._fingerprint import Fingerprint
from metagrad._plan import Plan, Save
from metagrad._replay import Progress
from metagrad._store import Kept
from metagrad._tree import tensor_leaves
from metagrad._types import ResumeError, State, Tree
from metagrad._witness import Witness

FILE = re.compile(r"(state|final|witness|reverse)-(\d{8})\.[0-9a-f]{8}\.safetensors")
PAUSE = 10
"""A bookmark is written when ten times as long has passed as the last one took: a tenth of the time at most."""


class RunFolder:
    """The journal of one run in a folder of its own.

    Files: `run.json`, what makes it this run; `state-t`, kept states and a bookmark of the forward run; `final-T`, the
    trained state; `witness-t`, the digests of the states up to t; `reverse-t`, what is known after reversing step t.

    Args:
        folder: made if absent.
        fingerprint: of the run.
        initial: the state before step 0.
        like: progress after the last step, for its shapes and types.
        wrt_params: whether the initial state has a cotangent at the end.

    Attributes:
        store: where the plan's states are kept; those that an earlier process left are there.
        witness: the digests of that process.
        final: the trained state, if it came so far, and `progress`, how far it came backwards.

    Raises:
        ResumeError: if another process uses the folder, or it is damaged, or of another run.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: Fingerprint, initial: State, like: Progress, wrt_params: bool
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder)
        try:
            claim(self.folder, fingerprint)
            for unfinished in self.folder.glob("*.unfinished"):
                unfinished.unlink()
            found = _files_by_kind(self.folder)
            self.store = DiskStore(self.folder, found["state"], Blueprint.of(Kept(initial, None)))
            self.witness = _read_witness(found["witness"], initial)
            self.final: State | None = None
            for path in found["final"].values():
                self.final = read_tree(path, Blueprint.of(initial))
            self.progress = _read_progress(found["reverse"], like, wrt_params)
            if self.progress is not None and self.final is None:
                raise ResumeError(f"{self.folder} holds no final-*.safetensors, the trained state, any more. {REMEDY}")
        except BaseException:
            # Or the same process, corrected, would find the folder in use.
            os.close(self._lock)
            raise
        self._planned: frozenset[int] = frozenset()
        # The newest file of each kind but the plan's states; the bookmark of a dead process is one of those by now.
        self._own = {kind: path for kind in ("final", "witness", "reverse") for path in found[kind].values()}
        self._pause = 0.0
        self._written_at = perf_counter()

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
            self._write("reverse", progress.step, _as_tensors(progress))

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def _due(self) -> bool:
        return perf_counter() - self._written_at >= self._pause

    def _write(self, kind: str, step: int, tree: Tree) -> None:
        start = perf_counter()
        path = write_tree(self.folder, f"{kind}-{step:08d}", tree)
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


def locked(folder: Path) -> int:
    """A lock that ends with the process, however it ends."""
    import fcntl  # Only here: Windows has none, and everything else works there.

    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ResumeError(f"{folder} is in use by another process. Wait for it, or name another folder.") from error
    return descriptor


def claim(folder: Path, fingerprint: Fingerprint) -> None:
    """Write `run.json` to an empty folder, or see that the one there says the same."""
    path, text = folder / "run.json", json.dumps(dict(fingerprint), indent=0, sort_keys=True)
    if not path.exists():
        if others := sorted({file.name for file in folder.iterdir()} - {"lock", "run.unfinished"}):
            raise ResumeError(f"{folder} has no run.json, but holds {others[0]}. Name an empty or a new folder.")
        unfinished = folder / "run.unfinished"
        try:
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
            sync_folder(folder)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise could_not_write(path.name, folder, error) from error
        return
    content = path.read_bytes()
    if content == text.encode():
        return
    try:
        found = dict(json.loads(content))
    except ValueError as error:
        raise ResumeError(f"{path} is damaged: it is no JSON any more. {REMEDY}") from error
    # First what was passed, then what a metric makes of it.
    for part in sorted([*fingerprint, *found], key=lambda part: part.startswith("metric")):
        if found.get(part) != fingerprint.get(part):
            raise ResumeError(
                f"{path} is of another run, or damaged: {part} was {found.get(part)} and is {fingerprint.get(part)}. "
                "Name another folder, or call with the arguments of the run that was begun here."
            )
    raise ResumeError(f"{path} is damaged: it was not written like this. {REMEDY}")


def _files_by_kind(folder: Path) -> dict[str, dict[int, Path]]:
    """The files of a run by kind and step; of those that replace one another only the newest, the others removed."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.glob("*.safetensors")):
        match = FILE.fullmatch(path.name)
        if match is None:
            raise ResumeError(f"{path} is damaged: no file of a run has such a name. {REMEDY}")
        found[match[1]][int(match[2])] = path
    newest: list[tuple[str, Callable[..., int]]] = [("witness", max), ("reverse", min)]
    for kind, choose in newest:
        for step in found[kind].keys() - ({choose(found[kind])} if found[kind] else set()):
            found[kind].pop(step).unlink()
    return found


def _read_witness(paths: dict[int, Path], initial: State) -> Witness:
    if not paths:
        return Witness()
    (step, path), *_ = paths.items()
    shape = (step + 1, len(tensor_leaves(initial)), 2)
    return Witness.of(read_tree(path, Blueprint.of(torch.empty(shape, dtype=torch.int64))))


def _as_tensors(progress: Progress) -> Tree:
    """What a file of `progress` holds: values in float64, and NaN, which no metric may be, for one not yet met."""
    values = [torch.tensor(nan if v is None else float(v), dtype=torch.float64) for v in progress.values]
    return (values, progress.carried or [], progress.totals)


def _read_progress(paths: dict[int, Path], like: Progress, wrt_params: bool) -> Progress | None:
    if not paths:
        return None
    (step, path), *_ = paths.items()
    carried = None if step == 0 and not wrt_params else like.carried
    values, carried, totals = read_tree(path, Blueprint.of(_as_tensors(like._replace(carried=carried))))
    known = [None if bool(v.isnan()) or w is None else v.to(w) for v, w in zip(values, like.values, strict=True)]
    return Progress(step, known, carried or None, totals)
