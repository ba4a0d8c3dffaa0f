"""Whose a run's folder is: one process at a time, one run, one number of ranks."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from metagrad._files import REMEDY, could_not_write, sync_folder
from metagrad._fingerprint import Fingerprint
from metagrad._ranks import Ranks
from metagrad._types import ResumeError


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


def of_rank(folder: Path, ranks: Ranks) -> Path:
    """The folder of one rank in that of a run.

    Raises:
        ResumeError: if the run was begun with another number of ranks.
    """
    ending = f"-of-{ranks.num_ranks}"
    others = sorted(path.name for path in folder.glob("rank-*") if not path.name.endswith(ending))
    if (folder / "run.json").exists():
        raise ResumeError(
            f"{folder} is of a run of one process. Name another folder for one of {ranks.num_ranks} ranks."
        )
    if others:
        raise ResumeError(
            f"{folder} holds {others[0]}: the run was begun with another number of ranks than {ranks.num_ranks}, whose "
            "sums are rounded differently. Start as many, or name another folder."
        )
    return folder / f"rank-{ranks.rank}{ending}"


def refuse_missing_files(folder: Path, of_ranks: Sequence[Mapping[str, set[int]]]) -> None:
    """Raise where one rank has nothing and another has come so far that all must have had something.

    Raises:
        ResumeError: naming both. To go on would delete what the other has.
    """
    empty = [rank for rank, found in enumerate(of_ranks) if not any(found.values())]
    far = [rank for rank, found in enumerate(of_ranks) if found.get("final") or found.get("reverse")]
    if empty and far:
        raise ResumeError(
            f"rank {empty[0]} has no files of this run in the `resume` it names, and rank {far[0]} has in {folder}. "
            "Name the same folder on every rank, and bring back what is lost; or delete all to start again."
        )
