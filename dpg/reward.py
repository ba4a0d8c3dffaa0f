"""The reward of a text: how much training the target on it moves the metric."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import metagrad as mg
from dpg.metrics import Params, ParamsMetric, TargetMetric
from dpg.target import Target


class Scores(NamedTuple):
    """Rewards of a batch of texts.

    Attributes:
        rewards: dΦ/dw of every text at w = 1.
        phi: Φ of the target trained on the texts; the mean over data sets if there are several.
        params: the parameters of the trained target (of the first data set).
    """

    rewards: Float[Tensor, " texts"]
    phi: float
    params: Params


@dataclass(frozen=True)
class MetagradReward:
    """Metagradients as rewards: the whole batch at once.

    Args:
        target: the model that trains on the texts.
        metric: a `TargetMetric`, or any function of the trained parameters that returns a scalar.
        cross_group: train on all texts together ("cross group batching" [thrush2026]). If False, texts of one prompt
            never share a training run: with groups of G there are G runs, the i-th on the i-th text of every prompt.
        schedule: which inner states to keep.

    Raises:
        ValueError: if the metric does not fit the target's model.
    """

    target: Target
    metric: TargetMetric | ParamsMetric
    cross_group: bool = True
    schedule: mg.Schedule = mg.Binomial(slots=8)

    def __post_init__(self) -> None:
        self._phi()

    def __call__(self, texts: list[str], group_size: int | None = None) -> Float[Tensor, " texts"]:
        """One reward for each text.

        Args:
            texts: the texts of one prompt stand together.
            group_size: texts of each prompt; needed where `cross_group` is False.

        Raises:
            ValueError: for no texts, or texts that do not fill their groups.
            NonFiniteError: if the target's training or the metagradient is not finite. No reward is ever made up.

        Cost: one inner training run and its reverse replay; with one inner step about twice a plain step.
        """
        return self.score(texts, group_size).rewards

    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        """The rewards with Φ and the trained parameters."""
        if self.cross_group:
            return self._score_together(texts)
        if group_size is None or len(texts) % group_size != 0:
            raise ValueError(
                f"without cross-group batching, {len(texts)} texts must come in whole groups; `group_size` is "
                f"{group_size}. Pass the number of texts of each prompt."
            )
        runs = [self._score_together(texts[member::group_size]) for member in range(group_size)]
        # Back from (member, prompt) to the order of `texts`, in which the texts of a prompt stand together.
        rewards = torch.stack([run.rewards for run in runs], dim=1).flatten()
        return Scores(rewards, sum(run.phi for run in runs) / group_size, runs[0].params)

    def phi(self, params: Params) -> float:
        """Φ of trained parameters."""
        with torch.no_grad():
            return float(self._phi()(params))

    def _score_together(self, texts: list[str]) -> Scores:
        phi = self._phi()
        result = mg.metagradient(
            lambda state: phi(state.params),
            self.target.step,
            self.target.model,
            self.target.batches(texts),
            self.target.weights(texts),
            schedule=self.schedule,
        )
        return Scores(result.meta["weights"], float(result.value), result.state.params)

    def _phi(self) -> ParamsMetric:
        return self.metric.bind(self.target.model) if isinstance(self.metric, TargetMetric) else self.metric
