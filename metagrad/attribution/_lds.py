"""The linear datamodelling score: do the predicted changes rank subsets as retraining does?"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metagrad._metric import Trajectory
from metagrad._types import Batches, Metric, State, Step, Tree
from metagrad.attribution._retrain import random_subsets, retrain
from metagrad.attribution._scores import Scores

NUM_RESAMPLES = 500
CONFIDENCE = 0.95


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """Rank correlations of predicted and true metrics over random subsets; prints as a report.

    Attributes:
        fraction: share of the examples that each subset leaves out.
        predicted, true: each query's metric without each subset, predicted and after retraining.
        by_query: Spearman's correlation over subsets, for each query.
        interval: 95 % confidence interval of their mean.
    """

    fraction: float
    predicted: Float[Tensor, "queries subsets"]
    true: Float[Tensor, "queries subsets"]
    by_query: Float[Tensor, " queries"]
    interval: tuple[float, float]

    @property
    def mean(self) -> float:
        """The score: the mean of `by_query`."""
        return float(self.by_query.mean())

    def __str__(self) -> str:
        queries, subsets = self.true.shape
        low, high = self.interval
        return (
            f"LDS {self.mean:.3f} (95 % interval {low:.3f} to {high:.3f}) over {queries} queries and {subsets} random "
            f"subsets of {self.fraction:.3g} of the examples, each left out and trained again\n"
            f"lowest query {float(self.by_query.min()):.3f}, highest {float(self.by_query.max()):.3f}"
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw predicted against true changes of the metrics, each query in its own standard deviations.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the picture needs matplotlib: pip install 'metagrad[examples]'.") from error
        scale = self.true.std(1, keepdim=True)
        middle = self.true.mean(1, keepdim=True)
        across, up = ((values - middle) / scale for values in (self.true, self.predicted))
        figure = Figure(figsize=(4.2, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        axes.scatter(across.flatten().cpu(), up.flatten().cpu(), s=4, alpha=0.4, linewidths=0)
        axes.set(
            xlabel="metric after retraining (standard deviations)",
            ylabel="predicted from scores",
            title=f"{self.fraction:.1%} left out: LDS {self.mean:.3f}",
        )
        figure.savefig(path, dpi=120)


def linear_datamodeling_score(
    scores: Scores,
    metrics: Sequence[Metric | Trajectory],
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    *,
    fraction: float = 0.01,
    num_subsets: int = 100,
    seed: int = 0,
    meta: Mapping[str, Tree] | None = None,
    processes: int = 1,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> LinearDatamodelingScore:
    """Whether `scores` predict what happens when examples are left out [ilyas2022]: retrains without random subsets.

    Randomness is held fixed: every training has the same start, batches, order and random numbers, and nothing changes
    but the examples' weights, from 1 to 0 [ilyas2025].

    Args:
        scores: to be tested; from `scores(...)` with the same metrics, step, params and batches, or from elsewhere.
        metrics, step, params, batches, meta: as for `scores`.
        fraction: share of the examples left out of each subset.
        num_subsets: how many subsets; at least 3.
        seed: of the subsets.
        processes, resume, progress: as for `retrain`.

    Returns:
        Spearman's correlation for each query, and the 95 % interval of their mean by bootstrap: queries and subsets are
        drawn again with replacement, 500 times, since both are samples.

    Raises:
        ValueError: if scores and metrics do not fit, for too few subsets, and as `random_subsets` and `retrain` do.

    Cost: `num_subsets` training runs.
    """
    if len(metrics) != len(scores.values):
        raise ValueError(
            f"`scores` has {len(scores.values)} queries, but there are {len(metrics)} metrics. Pass the same."
        )
    if num_subsets < 3:
        raise ValueError(f"`num_subsets` is {num_subsets}, too few for a rank correlation. Pass 3 or more.")
    removed = random_subsets(scores.scores.shape[1], fraction, num_subsets, seed)
    true = retrain(
        metrics, step, params, batches, removed, meta=meta, processes=processes, resume=resume, progress=progress
    )
    predicted = scores.predict(removed.to(scores.scores.device)).double().cpu()
    return LinearDatamodelingScore(
        fraction, predicted, true, spearman(predicted, true), _interval(predicted, true, seed)
    )


def spearman(left: Float[Tensor, "rows n"], right: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """Spearman's rank correlation of each pair of rows; equal entries share the mean of their ranks.

    Raises:
        ValueError: if a row is constant, so that it has no ranks to correlate.
    """
    ranks = [_centred_ranks(values) for values in (left, right)]
    sizes = [values.norm(dim=-1) for values in ranks]
    if any(bool((size == 0).any()) for size in sizes):
        raise ValueError(
            "a query's metric is the same for every subset, so nothing can be ranked. Leave out more examples, or "
            "choose a metric that depends on them."
        )
    correlation: Tensor = (ranks[0] * ranks[1]).sum(-1) / (sizes[0] * sizes[1])
    return correlation


def _centred_ranks(values: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """How many entries are smaller less how many are larger, half: the ranks about their mean, ties shared."""
    smaller = (values[..., None] > values[..., None, :]).sum(-1)
    larger = (values[..., None] < values[..., None, :]).sum(-1)
    ranks: Tensor = (smaller - larger).double() / 2
    return ranks


def _interval(
    predicted: Float[Tensor, "queries subsets"], true: Float[Tensor, "queries subsets"], seed: int
) -> tuple[float, float]:
    """The interval between the quantiles of the mean correlation over bootstrap samples."""
    generator = torch.Generator().manual_seed(seed)
    queries, subsets = true.shape
    means: list[Tensor] = []
    while len(means) < NUM_RESAMPLES:
        rows = torch.randint(queries, (queries,), generator=generator)
        columns = torch.randint(subsets, (subsets,), generator=generator)
        if len(columns.unique()) > 1:
            means.append(_mean_correlation(predicted[rows][:, columns], true[rows][:, columns]))
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.stack(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _mean_correlation(predicted: Float[Tensor, "queries subsets"], true: Float[Tensor, "queries subsets"]) -> Tensor:
    return spearman(predicted, true).mean()
