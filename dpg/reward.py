"""The reward of a text: how much training the target on it moves the metric."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import metagrad as mg
from dpg.judge import Judge
from dpg.metrics import Params, ParamsMetric, TargetMetric
from dpg.target import Target


class Scores(NamedTuple):
    """Rewards of a batch of texts.

    Attributes:
        rewards: one for each text.
        phi: Φ of the target trained on the texts; the mean over data sets if there are several, None if none was
            trained.
        params: the parameters of the trained target (of the first data set), or None.
    """

    rewards: Float[Tensor, " texts"]
    phi: float | None
    params: Params | None


class Reward(ABC):
    """A way to score texts, a whole batch at once."""

    groupless: bool = False
    """Whether texts are compared with the whole batch instead of those of their own prompt."""

    judge: Judge | None = None
    """What training on texts comes to, where the reward trains a target."""

    @abstractmethod
    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        """The rewards of `texts`, in which the `group_size` texts of one prompt stand together."""

    def __call__(self, texts: list[str], group_size: int | None = None) -> Float[Tensor, " texts"]:
        """One reward for each text; as `score`."""
        return self.score(texts, group_size).rewards


@dataclass(frozen=True)
class MetagradReward(Reward):
    """Metagradients as rewards: dΦ/dw of every text at w = 1.

    Args:
        target: the model that trains on the texts.
        metric: a `TargetMetric`, or any function of the trained parameters that returns a scalar.
        cross_group: train on all texts together ("cross group batching" [thrush2026]). If False, texts of one prompt
            never share a training run: with groups of G there are G runs, the i-th on the i-th text of every prompt.
        schedule: which inner states to keep.

    Raises:
        ValueError: if the metric does not fit the target; when called, for no texts, or texts that do not fill their
            groups where `cross_group` is False.
        NonFiniteError: when called, if the target's training or the metagradient is not finite. No reward is ever
            made up.

    Cost of a call: one inner training run and its reverse replay; with one inner step about twice a plain step.
    """

    target: Target
    metric: TargetMetric | ParamsMetric
    cross_group: bool = True
    schedule: mg.Schedule = field(default_factory=lambda: mg.Binomial(slots=8))

    def __post_init__(self) -> None:
        _ = self.judge

    @cached_property
    def judge(self) -> Judge:
        """The target and the metric."""
        return Judge(self.target, self.metric)

    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        if self.cross_group:
            # Rewards of one prompt's texts are compared with each other, and what a text is worth depends on the inner
            # step that it is in: so they share one.
            return self._score_together(texts, group_size or 1)
        runs = [self._score_together(part) for part in inverse_groups(texts, group_size)]
        return Scores(interleaved([run.rewards for run in runs]), fmean(run.phi for run in runs), runs[0].params)

    def phi(self, params: Params) -> float:
        """Φ of trained parameters."""
        return self.judge.phi(params)

    def _score_together(self, texts: list[str], group_size: int = 1) -> Scores:
        phi = self.judge.bound.phi
        result = mg.metagradient(
            lambda state: phi(state.params),
            self.target.step,
            self.target.model,
            self.target.batches(texts, group_size),
            self.target.weights(texts),
            schedule=self.schedule,
        )
        return Scores(result.meta["weights"], float(result.value), result.state.params)


def inverse_groups(texts: list[str], group_size: int | None) -> list[list[str]]:
    """As many data sets as a prompt has texts: the i-th of the i-th text of every prompt.

    Raises:
        ValueError: if the texts do not fill their groups.
    """
    if group_size is None or not texts or len(texts) % group_size != 0:
        raise ValueError(
            f"without cross-group batching, {len(texts)} texts must come in whole groups; `group_size` is "
            f"{group_size}. Pass the number of texts of each prompt."
        )
    return [texts[member::group_size] for member in range(group_size)]


def interleaved(rewards: list[Float[Tensor, " prompts"]]) -> Float[Tensor, " texts"]:
    """Rewards of inverse groups, back in the order in which the texts of a prompt stand together."""
    return torch.stack(rewards, dim=1).flatten()
