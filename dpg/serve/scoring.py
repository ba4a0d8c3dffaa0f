"""From a whole batch to its rewards: what a run of `dpg` does with the texts of a step."""

from collections.abc import Callable
from math import isfinite
from time import perf_counter

from dpg.grpo import reward_spread
from dpg.judge import Judge
from dpg.reward import Reward
from dpg.serve.batch import Batch, Rewards


def scorer(reward: Reward, judge: Judge | None = None) -> Callable[[Batch], Rewards]:
    """A function that scores a whole batch.

    Args:
        reward: of texts, in the order of their groups and ids.
        judge: what measures the trained target; None for the reward's own.
    """
    judge = reward.judge if judge is None else judge

    def score(batch: Batch) -> Rewards:
        start = perf_counter()
        samples, group_size = batch.ordered(), batch.group_size()
        texts = [sample.text for sample in samples]
        scores = reward.score(texts, group_size)
        spread = reward_spread(scores.rewards)
        if scores.phi is not None and not isfinite(scores.phi):
            raise ValueError(f"Φ is {scores.phi}.")
        ids = [sample.id for sample in samples]
        rescaled = None if spread == 0 else (scores.rewards.double() / spread).tolist()
        return Rewards(
            raw=dict(zip(ids, scores.rewards.tolist(), strict=True)),
            rescaled=None if rescaled is None else dict(zip(ids, rescaled, strict=True)),
            phi=scores.phi,
            reward_std=float(spread),
            seconds=perf_counter() - start,
            measures={} if judge is None or scores.params is None else judge.measures(scores.params, texts),
        )

    return score
