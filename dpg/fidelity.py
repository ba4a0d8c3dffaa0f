"""Are the rewards true? Metagradients along a finished run, against training again at other weights, in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

import metagrad as mg
from dpg.agreement import Agreement, Interval, agreement
from dpg.build import inner_optimizer, load_target
from dpg.fidelity_page import Cell, write
from dpg.folder import RunFolder, RunFolderError, validation_file
from dpg.preset import restore
from dpg.reward import MetagradReward, Scores
from dpg.settings import Settings
from dpg.verify import fresh_target

MARKS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in a run its texts are looked at, as shares of its steps."""


@dataclass(frozen=True)
class Trial:
    """One training run on some texts, and the same run at other weights."""

    reward: MetagradReward
    texts: list[str]
    seed: int

    @cached_property
    def scores(self) -> Scores:
        """Rewards and Φ of the run itself."""
        return self.reward.score(self.texts)

    def phi_at(self, weights: Float[Tensor, " texts"]) -> float:
        """Φ after training with these weights.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        phi = self.reward.phi(self.reward.target.fine_tune(self.texts, weights.to(self.scores.rewards)))
        if not math.isfinite(phi):
            raise mg.NonFiniteError(f"the metric is {phi} after training at other weights. Pass lower learning rates.")
        return phi

    def left_out(self, number: int) -> Agreement:
        """Random texts left out one at a time: their weight is 0, the denominators stay."""
        chosen = torch.randperm(len(self.texts), generator=self._generator())[:number]
        weights = 1 - torch.eye(len(self.texts), dtype=torch.float64)[chosen]
        true = [self.scores.phi - self.phi_at(row) for row in weights]
        return self._agreement(self.scores.rewards.cpu()[chosen], true)

    def changed(self, number: int, spread: float) -> Agreement:
        """All weights changed at random together."""
        shape = number, len(self.texts)
        changes = spread * torch.randn(shape, generator=self._generator(), dtype=torch.float64)
        true = [self.phi_at(1 + row) - self.scores.phi for row in changes]
        return self._agreement(changes @ self.scores.rewards.cpu(), true)

    def smoothness(self, spread: float) -> Interval:
        """Whether the trained parameters go on in their direction when weights move by `spread` and again."""
        target, phi = self.reward.target, self.reward.judge.bound.phi
        run = target.step, target.model, target.batches(self.texts), target.weights(self.texts)
        found = mg.check.metasmoothness(lambda state: phi(state.params), *run, step_sizes=spread, seed=self.seed)
        return Interval(*found.mean_agreement())

    def _agreement(self, predicted: Float[Tensor, " changes"], true: list[float]) -> Agreement:
        return agreement(predicted.cpu(), torch.tensor(true, dtype=torch.float64), self.scores.phi, self.seed)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def fidelity(
    path: Path,
    *,
    num_texts: int = 128,
    num_left_out: int = 32,
    num_changes: int = 16,
    spread: float = 0.1,
    inner_steps: Sequence[int] = (1, 2, 4),
    lr_factors: Sequence[float] = (0.1, 1.0, 10.0),
    seed: int = 0,
) -> list[Cell]:
    """Predicted and true changes of Φ at five marks of a run; writes `fidelity.json`, `.md` and `.png` there.

    The same call gives the same numbers. At every mark, number of steps and learning rate the same texts are left out
    (by their position) and the same δ are tried.

    Args:
        path: a finished run.
        num_texts: the first so many texts of a validation; the target trains on them.
        num_left_out: texts that are left out, one at a time.
        num_changes: random changes δ of all weights at once.
        spread: standard deviation of δ; also the step size at which metasmoothness is measured.
        inner_steps: numbers of steps in which the target trains on the texts.
        lr_factors: learning rates, in units of the run's own.
        seed: of everything random.

    Raises:
        RunFolderError: if the run is not finished, or has too few texts.
        ValueError: for sizes that do not fit.
        NonFiniteError: if a training run diverges.

    Cost: for each mark, number of steps and learning rate one metagradient and `num_left_out + num_changes + 9`
        training runs on `num_texts` texts.
    """
    _refuse_sizes(num_texts, num_left_out, num_changes, spread, inner_steps, lr_factors)
    folder = RunFolder(path)
    preset = restore(folder.read_config())
    settings = preset.settings
    texts = {step: _texts(folder, step, num_texts) for step in _marks(folder, settings.num_steps)}
    target = load_target(replace(settings, target=str(fresh_target(path))))
    target.model.double()
    kinds = [(number, factor * settings.inner_lr) for number in inner_steps for factor in lr_factors]
    cells = []
    for step, (number, lr) in track([(step, kind) for step in texts for kind in kinds], "fidelity"):
        optimizer = inner_optimizer(replace(settings, inner_lr=lr))
        trained = replace(target, optimizer=optimizer, inner_batch_size=num_texts // number)
        trial = Trial(MetagradReward(trained, preset.experiment.metric()), texts[step], seed)
        left_out, changed = trial.left_out(num_left_out), trial.changed(num_changes, spread)
        cells.append(Cell(step, number, lr, trial.scores.phi, left_out, changed, trial.smoothness(spread)))
    sizes = {"num_texts": num_texts, "spread": spread, "seed": seed}
    folder.write_json("fidelity.json", {**sizes, "cells": [cell.as_dict() for cell in cells]})
    title = f"{preset.experiment.name}: {num_texts} texts, all weights changed by {spread:g}"
    write(folder, title, cells, own=min(kinds, key=lambda kind: _distance(kind, settings)))
    return cells


def _refuse_sizes(
    num_texts: int,
    num_left_out: int,
    num_changes: int,
    spread: float,
    inner_steps: Sequence[int],
    lr_factors: Sequence[float],
) -> None:
    if (
        not (inner_steps and lr_factors)
        or min(*inner_steps, *lr_factors, spread) <= 0
        or any(num_texts % number for number in inner_steps)
    ):
        raise ValueError(
            f"{num_texts} texts in {tuple(inner_steps)} inner steps of one size, learning rates times "
            f"{tuple(lr_factors)} and a spread of {spread}: steps must divide the texts, and all be above 0."
        )
    if not 3 <= num_left_out <= num_texts or num_changes < 3:
        raise ValueError(
            f"{num_left_out} of {num_texts} texts left out, and {num_changes} changes: a correlation needs at least "
            "three of each, and no more texts can be left out than there are."
        )


def _marks(folder: RunFolder, num_steps: int) -> list[int]:
    """The validated steps nearest to the marks, each once."""
    found = [step for step in range(num_steps + 1) if (folder.path / validation_file(step)).exists()]
    if len(found) < 2 or found[-1] != num_steps:
        raise RunFolderError(
            f"{folder.path} holds the texts of {len(found)} validations, and at least two are needed, one of the last "
            f"step, {num_steps}. Continue the run with --resume, or start a new one."
        )
    return list(dict.fromkeys(min(found, key=lambda step: abs(step - mark * num_steps)) for mark in MARKS))


def _texts(folder: RunFolder, step: int, num_texts: int) -> list[str]:
    texts = folder.read_texts(validation_file(step))
    if len(texts) < num_texts:
        raise RunFolderError(
            f"{folder.path / validation_file(step)} holds {len(texts)} texts, not {num_texts}. Ask for fewer."
        )
    return texts[:num_texts]


def _distance(kind: tuple[int, float], settings: Settings) -> tuple[int, float]:
    """How far a number of inner steps and a learning rate are from those of the run itself."""
    num_texts = settings.prompts_per_step * (settings.group_size if settings.cross_group else 1)
    steps = math.ceil(num_texts / settings.inner_batch_size)
    return abs(kind[0] - steps), abs(math.log(kind[1] / settings.inner_lr))
