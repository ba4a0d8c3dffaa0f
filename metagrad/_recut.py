"""The folder of a sharded run that goes on with another number of ranks: the rows in its files cut anew."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import optree
import torch
from torch import Tensor

from metagrad._claim import claim, locked
from metagrad._exchange import rows
from metagrad._files import REMEDY, Blueprint, read_tree, sync_folder, write_tree
from metagrad._fingerprint import Fingerprint
from metagrad._ranks import Ranks
from metagrad._rows import Memory
from metagrad._store import Kept
from metagrad._tree import same_bits, tensor_leaves
from metagrad._types import ResumeError, State, Tree

Names = list[str | None]
"""For each tensor the parameter whose rows it holds, or None where every rank has all of it."""


def recut(folder: Path, fingerprint: Fingerprint, initial: State, like: Tree, wrt_params: bool, ranks: Ranks) -> None:
    """Put files of this number of ranks in the place of those of another, if the run was begun so; all or none.

    The files of the others are deleted once all of these are there. Digests of states are not carried over.

    Args:
        fingerprint: of this rank. What tells of rows or of a rank's batches is not compared.
        like: what a file of progress holds after the last step.

    Raises:
        ResumeError: if they are of another run, damaged, in use, or do not all lie in this folder.
    """
    found = ranks.agreed(lambda: _begun_by(folder, ranks.num_ranks) if ranks.rank == 0 else None, str(folder))
    num_old = ranks.first(found, str(folder))
    if num_old is None:
        return
    old = [folder / f"rank-{rank}-of-{num_old}" for rank in range(num_old)]
    new, place = folder / f"rank-{ranks.rank}-of-{ranks.num_ranks}", folder / f"recut-{ranks.rank}"

    def write() -> None:
        shutil.rmtree(place, ignore_errors=True)  # Of an earlier try.
        shutil.rmtree(new, ignore_errors=True)
        place.mkdir()
        claim(place, fingerprint)
        for name, own, names in _trees(old, initial, like, wrt_params):
            tree = _cut_anew(own, names, name, old, initial.optimizer.shapes, ranks)
            if name == "state-00000000":
                _refuse_other_start(old[0], tree.state, initial)
            write_tree(place, name, tree)

    with ExitStack() as stack:

        def lock() -> None:
            for path in old if ranks.rank == 0 else []:
                stack.callback(os.close, locked(path))

        steps: list[Callable[[], object]] = [lock, lambda: _refuse_other_run(old, fingerprint), write]
        steps += [lambda: place.rename(new), lambda: _remove(folder, old) if ranks.rank == 0 else None]
        for act in steps:
            ranks.agreed(act, f"the folder {folder}")


def _begun_by(folder: Path, num_ranks: int) -> int | None:
    """Another number of ranks all of whose folders are there, where not all of this number are."""
    for path in folder.glob("removed-*"):
        shutil.rmtree(path)  # A kill came while it was deleted.
    numbers = {int(path.name.rpartition("-")[2]) for path in folder.glob("rank-*-of-*")}
    whole = {
        number
        for number in numbers
        if all((folder / f"rank-{rank}-of-{number}" / "run.json").exists() for rank in range(number))
    }
    if num_ranks in whole:
        # A kill came between the last file of these and the deletion of the others, which hold no more.
        for number in numbers - {num_ranks}:
            _remove(folder, sorted(folder.glob(f"rank-*-of-{number}")))
        return None
    return min(whole, default=None)


def _remove(folder: Path, old: Sequence[Path]) -> None:
    for path in old:
        # Renamed first: a set is whole, or has a folder less.
        gone = path.rename(folder / f"removed-{path.name}")
        sync_folder(folder)
        shutil.rmtree(gone)


def _refuse_other_start(folder: Path, state: State, initial: State) -> None:
    if not all(map(same_bits, tensor_leaves(state), (leaf.cpu() for leaf in tensor_leaves(initial)))):
        raise ResumeError(
            f"{folder} is of another run: its initial state is another. Name another folder, or call with the "
            "parameters of the run that was begun here."
        )


def _refuse_other_run(old: Sequence[Path], fingerprint: Fingerprint) -> None:
    if missing := [path.name for path in old if not (path / "run.json").exists()]:
        raise ResumeError(
            f"{old[0].parent} holds no {missing[0]} here. To go on with another number of ranks, all must see the "
            "folders of the earlier ones: copy them to one place."
        )
    path = old[0] / "run.json"
    try:
        found = dict(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ResumeError(f"{path} is damaged: it is no JSON any more. {REMEDY}") from error
    for part, value in fingerprint.items():
        own = part.startswith(("batches[", "metric ", "state.params[", "state.optimizer.optimizer"))
        if not own and found.get(part) != value:
            raise ResumeError(
                f"{old[0]} is of another run, or damaged: {part} was {found.get(part)} and is {value}. Name another "
                "folder, or call with the arguments of the run that was begun here."
            )


def _trees(old: Sequence[Path], initial: State, like: Tree, wrt_params: bool) -> Iterator[tuple[str, Tree, Names]]:
    """The files that all old ranks have, without their checksums: what each holds, and of which parameters."""
    common = set.intersection(*({path.name.split(".")[0] for path in folder.glob("*.safetensors")} for folder in old))
    of_state = _names(initial)
    by_field = dict(zip(("params", "optimizer", "buffers"), _names_by_field(initial), strict=True))
    for name in sorted(common):
        kind, step = name.split("-")
        if kind == "reverse":
            values, carried, totals = like
            carried = [] if int(step) == 0 and not wrt_params else carried
            own: Names = [None] * len(values)
            for _ in carried:
                own += by_field["params"] + by_field["optimizer"] + by_field["buffers"]
            yield name, (values, carried, totals), own + [None] * len(tensor_leaves(totals))
        elif kind != "witness":
            yield name, Kept(initial, None) if kind == "state" else initial, of_state


def _names(state: Tree) -> Names:
    """Of the tensors of a state, in order."""
    paths, leaves, _ = optree.tree_flatten_with_path(state)
    divided = [State._fields.index(field) for field in ("params", "optimizer")]
    return [
        str(path[-1]) if path[0] in divided and leaf.is_floating_point() else None
        for path, leaf in zip(paths, leaves, strict=True)
        if isinstance(leaf, Tensor)
    ]


def _names_by_field(state: State) -> tuple[Names, Names, Names]:
    """Of the floating-point tensors that have a cotangent."""
    memory: Memory = state.optimizer
    paths, leaves, _ = optree.tree_flatten_with_path(memory.optimizer)
    remembered = [str(path[-1]) for path, leaf in zip(paths, leaves, strict=True) if leaf.is_floating_point()]
    return [*state.params], [*remembered], [None for b in state.buffers.values() if b.is_floating_point()]


def _cut_anew(
    own: Tree, names: Names, name: str, old: Sequence[Path], shapes: dict[str, tuple[int, ...]], ranks: Ranks
) -> Tree:
    """A tree like `own` for this rank, from the files of the old ones, one after the other."""
    leaves = tensor_leaves(own)
    pieces: list[list[Tensor]] = [[] for _ in leaves]
    found: Tree = None
    for rank, folder in enumerate(old):
        like = [
            leaf if of is None else rows(torch.empty(shapes[of], dtype=leaf.dtype, device="meta"), rank, len(old))
            for leaf, of in zip(leaves, names, strict=True)
        ]
        path = next(folder.glob(f"{name}.*.safetensors"))
        blueprint = Blueprint(Blueprint.of(_with_tensors(own, like)).tree, [torch.device("cpu")] * len(like))
        found = read_tree(path, blueprint)
        for place, part, of in zip(pieces, tensor_leaves(found), names, strict=True):
            if of is None:
                place[:] = [part]
            else:
                first, last = _stretch(shapes[of], ranks.rank, ranks.num_ranks)
                start, _ = _stretch(shapes[of], rank, len(old))
                place.append(part[max(first - start, 0) : max(last - start, 0)].clone())
    whole = [p[0] if of is None else torch.cat(p) for p, of in zip(pieces, names, strict=True)]
    return _with_tensors(found, whole)


def _stretch(shape: tuple[int, ...], rank: int, num_ranks: int) -> tuple[int, int]:
    """The first row of a rank, and the one after its last."""
    places = rows(torch.arange(shape[0] if shape else 1), rank, num_ranks)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _with_tensors(tree: Tree, tensors: Sequence[Tensor]) -> Tree:
    following = iter(tensors)
    return optree.tree_map(lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf, tree)
