"""Exact gradients of any metric of a trained model with respect to anything its training depended on."""

from metagrad import check, optim
from metagrad._gradient import metagradient, train
from metagrad._loss import weighted
from metagrad._schedule import Binomial, EveryStep, Schedule
from metagrad._step import TrainStep
from metagrad._store import RamStore, Store
from metagrad._types import NonFiniteError, ReplayMismatchError, Result, State, Stats

__all__ = [
    "Binomial",
    "EveryStep",
    "NonFiniteError",
    "RamStore",
    "ReplayMismatchError",
    "Result",
    "Schedule",
    "State",
    "Stats",
    "Store",
    "TrainStep",
    "check",
    "metagradient",
    "optim",
    "train",
    "weighted",
]
