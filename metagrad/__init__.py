"""Exact gradients of any metric of a trained model with respect to anything its training depended on."""

from metagrad import attribution, check, distributed, optim
from metagrad._buffers import DifferentiableStatistics
from metagrad._cross_entropy import linear_cross_entropy
from metagrad._custom import AutogradStep
from metagrad._disk import DiskStore
from metagrad._estimate import Budget, Estimate
from metagrad._gradient import dry_run, metagradient
from metagrad._hierarchy import Hierarchical, Tree
from metagrad._layer import train
from metagrad._loss import weighted
from metagrad._metric import Trajectory
from metagrad._schedule import Binomial, EveryStep, Schedule
from metagrad._step import TrainStep
from metagrad._store import PinnedStore, RamStore, Store
from metagrad._types import NonFiniteError, ReplayMismatchError, Result, ResumeError, State, Stats, Step

__all__ = [
    "AutogradStep",
    "Binomial",
    "Budget",
    "DifferentiableStatistics",
    "DiskStore",
    "Estimate",
    "EveryStep",
    "Hierarchical",
    "NonFiniteError",
    "PinnedStore",
    "RamStore",
    "ReplayMismatchError",
    "Result",
    "ResumeError",
    "Schedule",
    "State",
    "Stats",
    "Step",
    "Store",
    "TrainStep",
    "Trajectory",
    "Tree",
    "attribution",
    "check",
    "distributed",
    "dry_run",
    "linear_cross_entropy",
    "metagradient",
    "optim",
    "train",
    "weighted",
]
