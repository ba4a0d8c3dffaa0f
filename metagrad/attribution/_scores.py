"""Scores of training examples: the metagradient with respect to their weights, all at 1."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metagrad._gradient import DEFAULT_SCHEDULE, metagradient
from metagrad._metric import Trajectory
from metagrad._schedule import Schedule
from metagrad._types import Batches, Metric, State, Step, Tree


class Scores(NamedTuple):
    """What every training example did to every query.

    Attributes:
        values: Φ of each query after training on all examples.
        scores: τ, the derivative of each Φ by each example's weight. Above 0: more of the example, more Φ.
    """

    values: Float[Tensor, " queries"]
    scores: Float[Tensor, "queries examples"]

    def predict(self, removed: Bool[Tensor, "subsets examples"]) -> Float[Tensor, "queries subsets"]:
        """Φ if the examples of each subset had been left out: Φ − Σ τ_i over the subset, its first-order estimate.

        Raises:
            ValueError: if `removed` is not one row of booleans per subset.
        """
        refuse_other_subsets(removed, self.scores.shape[1])
        return self.values[:, None] - self.scores @ removed.to(self.scores).T

    def __str__(self) -> str:
        queries, examples = self.scores.shape
        lines = [f"scores of {examples} examples for {queries} queries"]
        for query, (value, row) in enumerate(zip(self.values, self.scores, strict=True)):
            most = row.abs().argsort(descending=True)[:3].tolist()
            named = ", ".join(f"{i} ({row[i]:+.2e})" for i in most)
            lines.append(f"query {query}: {value:.4g}; most moved by examples {named}")
        return "\n".join(lines)


def scores(
    metrics: Sequence[Metric | Trajectory],
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    num_examples: int,
    *,
    meta: Mapping[str, Tree] | None = None,
    queries_at_once: int = 32,
    schedule: Schedule = DEFAULT_SCHEDULE,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Scores:
    """The exact influence of every training example on each of several metrics [ilyas2025].

    Args:
        metrics: one function of the trained state for each query.
        step: on a loss that reads meta["weights"], for instance `TrainStep(mg.weighted(loss), optimizer)`.
        params, batches, schedule, progress: as for `metagradient`.
        num_examples: how many weights there are; batch["index"] counts them from 0.
        meta: other metaparameters that the step reads.
        queries_at_once: metrics that share one training run and one replay; each takes the memory of a cotangent.
        resume: a folder in which to go on if the process was killed.

    Returns:
        The values of the metrics and the scores; examples that no batch refers to have score 0.

    Raises:
        ValueError: for no metric, or counts below 1; and as `metagradient` does.

    Cost: for each block of `queries_at_once` metrics a training run, its replay, and 6 forward passes per step and
        metric.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(mg.weighted(lambda p, b: (p["w"] - b["y"]) ** 2), mg.optim.sgd(lr=0.25))
        >>> batch = {"y": torch.tensor([1.0, -1.0]), "index": torch.tensor([0, 1])}
        >>> query = lambda state: state.params["w"] + 0
        >>> mg.attribution.scores([query], step, {"w": torch.tensor(0.0)}, [batch], num_examples=2).scores
        tensor([[ 0.2500, -0.2500]])
    """
    if not isinstance(metrics, Sequence) or not metrics:
        raise ValueError("`metrics` must be a list of at least one function of the trained state, one for each query.")
    if num_examples < 1 or queries_at_once < 1:
        raise ValueError(f"`num_examples` is {num_examples}, `queries_at_once` {queries_at_once}. Pass 1 or more.")
    complete = {**refuse_weights(meta), "weights": torch.ones(num_examples, **like_params(params))}
    blocks = []
    for start in range(0, len(metrics), queries_at_once):
        folder = None if resume is None else Path(resume) / f"queries-{start:05d}"
        chosen = list(metrics[start : start + queries_at_once])
        blocks.append(
            metagradient(chosen, step, params, batches, complete, schedule=schedule, resume=folder, progress=progress)
        )
    values, gradients = [block.value for block in blocks], [block.meta["weights"] for block in blocks]
    return Scores(torch.cat(values), torch.cat(gradients))


def refuse_weights(meta: Mapping[str, Tree] | None) -> Mapping[str, Tree]:
    """`meta`, or nothing; raises if it names the weights, which are ours to set."""
    if meta is not None and "weights" in meta:
        raise ValueError("`meta` holds 'weights', which are set here: 1 for every example, or 0 if left out.")
    return meta or {}


def refuse_other_subsets(removed: Tensor, num_examples: int) -> None:
    """Raise unless `removed` is one row of booleans for each subset."""
    if removed.dtype != torch.bool or removed.ndim != 2 or removed.shape[1] != num_examples:
        raise ValueError(
            f"`removed` is {removed.dtype} of shape {tuple(removed.shape)}. Pass booleans of shape (subsets, "
            f"{num_examples}), True where an example is left out; `random_subsets` draws some."
        )


class Like(TypedDict):
    """Where weights belong, and in which precision."""

    dtype: torch.dtype
    device: torch.device


def like_params(params: Mapping[str, Tensor] | nn.Module | State) -> Like:
    """The type and device of the first parameter."""
    tensors = params.params if isinstance(params, State) else params
    first = next(iter(tensors.parameters() if isinstance(tensors, nn.Module) else tensors.values()))
    return {"dtype": first.dtype, "device": first.device}
