"""Which runs are compared: quick ones, the usual list, and everything."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import isqrt
from typing import Literal, TypeAlias

from benchmarks.peers.tasks import LARGE, MODELS, Model

LR, EPS_ROOT, WEIGHT_DECAY = 1e-3, 1e-8, 0.01

Optimizer: TypeAlias = Literal["adamw", "sgd"]
Kept: TypeAlias = Literal["all", "sqrt", "8 slots"]


@dataclass(frozen=True)
class Case:
    """One run: its model, optimizer, number of steps, micro-batches in a batch, and the states that are kept.

    Where it `compiles`, the contenders that need torch.compile take part: they take a minute or more to start.
    """

    model: Model
    optimizer: Optimizer
    num_steps: int
    num_pieces: int = 1
    kept: Kept = "all"
    compiles: bool = False

    def __str__(self) -> str:
        pieces = "" if self.num_pieces == 1 else f", {self.num_pieces} micro-batches"
        return f"{self.model.name}, {self.optimizer}, T={self.num_steps}, keeps {self.kept}{pieces}"

    @property
    def num_slots(self) -> int:
        """States that are kept at most."""
        return {"all": self.num_steps, "sqrt": isqrt(self.num_steps - 1) + 1, "8 slots": 8}[self.kept]


GPT2, GPT2_LARGER, LLAMA, LLAMA_LARGER, CNN, MLP = MODELS

QUICK = [
    Case(GPT2, "adamw", 2),
    Case(LLAMA, "sgd", 2),
    Case(CNN, "sgd", 2),
    Case(MLP, "adamw", 8, compiles=True),
]
ON_GPU = [
    Case(LARGE[0], "adamw", 1, num_pieces=16, compiles=True),
    Case(LARGE[1], "adamw", 8, num_pieces=2, compiles=True),
]
USUAL = [
    Case(GPT2, "adamw", 2, compiles=True),
    Case(GPT2, "adamw", 8, kept="sqrt"),
    Case(GPT2, "adamw", 2, num_pieces=4),
    Case(GPT2_LARGER, "adamw", 1),
    Case(LLAMA, "sgd", 2),
    Case(LLAMA_LARGER, "adamw", 1),
    Case(CNN, "sgd", 2),
    Case(MLP, "adamw", 32, kept="8 slots"),
    Case(MLP, "sgd", 32, num_pieces=4, kept="sqrt"),
]


def everything() -> list[Case]:
    """All that differ: sqrt(T) is fewer than all from T=8 on, and 8 slots are at T=32."""
    kept: dict[Kept, list[int]] = {"all": [1, 2, 8, 32], "sqrt": [8, 32], "8 slots": [32]}
    runs = [(which, num_steps) for which, steps in kept.items() for num_steps in steps]
    return [
        Case(model, optimizer, num_steps, pieces, which, compiles=True)
        for model, optimizer, pieces, (which, num_steps) in product(MODELS, ["adamw", "sgd"], [1, 4], runs)
    ]


def selected(cases: list[Case], wanted: Callable[[Case], bool]) -> list[Case]:
    """Those of `cases` that are wanted.

    Raises:
        ValueError: if none is.
    """
    if found := [case for case in cases if wanted(case)]:
        return found
    listed = "\n".join(map(str, cases))
    raise ValueError(f"no case of the list fits what was asked for. Add --full, or choose from:\n{listed}")
