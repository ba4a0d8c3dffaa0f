"""What is to be the same on every rank of a run, and is compared: what differs would be summed all the same."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any

import torch

from metagrad._disk import DiskStore
from metagrad._metric import Objective
from metagrad._ranks import Ranks
from metagrad._replay import Terms
from metagrad._store import Store
from metagrad._types import State, Term

APART = 1e-3
"""Relative difference of one number on two ranks that rounding does not explain."""


def refuse_unequal(ranks: Ranks, settings: Mapping[str, object]) -> None:
    """Raise on every rank for a setting, by name, that is not equal on all.

    Raises:
        ValueError: naming it, and a rank that has another.
    """
    for name, first, rank, value in _beside_the_first(ranks, settings, "the settings of the run"):
        if value != first:
            raise ValueError(f"{name} is {first} on rank 0 and {value} on rank {rank}. Pass the same.")


def refuse_shared_folder(ranks: Ranks, store: Store | None) -> None:
    """Raise on every rank where two keep their states in one folder.

    Raises:
        ValueError: naming it.
    """
    own = (socket.gethostname(), os.fspath(Path(store.folder).resolve())) if isinstance(store, DiskStore) else None
    folders = [folder for folder in ranks.gathered(own, "the folders of states") if folder is not None]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(
                f"several ranks keep their states in {folder[1]}, and would write over each other's. Give each one of "
                'its own, such as mg.DiskStore(f"states-{ranks.rank}").'
            )


def alike(ranks: Ranks, objective: Objective, num_steps: int, whole: bool) -> Terms:
    """The terms of the metrics, once they and the trained parameters are seen to be the same on every rank.

    Args:
        whole: whether every rank has all parameters.
    """

    def at(state: State) -> Sequence[Term | None]:
        if whole and state.step == num_steps:
            norms = torch.stack([p.detach().norm().double().cpu() for p in state.params.values()]).tolist()
            named = {f"the norm of trained parameter {name!r}": x for name, x in zip(state.params, norms, strict=True)}
            _refuse_apart(ranks, named, "Give every rank the same learning rate, loss and settings of the step.")
        found = objective.at(state)
        values = {f"metric {k}": float(term.value) for k, term in enumerate(found) if term is not None}
        if values:  # At the same states on all ranks, as `refuse_unequal` has seen.
            _refuse_apart(ranks, values, "Every rank evaluates the whole metric, on the same examples.")
        return found

    return at


def _refuse_apart(ranks: Ranks, numbers: Mapping[str, float], advice: str) -> None:
    for name, first, rank, value in _beside_the_first(ranks, numbers, "what is to be the same on all ranks"):
        if not isclose(value, first, rel_tol=APART, abs_tol=1e-30):
            raise ValueError(f"{name} is {first:g} on rank 0 and {value:g} on rank {rank}. {advice}")


def _beside_the_first(ranks: Ranks, own: Mapping[str, Any], what: str) -> Iterator[tuple[str, Any, int, Any]]:
    """By name what rank 0 has, and what each rank has."""
    found = ranks.gathered(dict(own), what)
    return ((name, found[0][name], rank, value) for rank, others in enumerate(found) for name, value in others.items())
