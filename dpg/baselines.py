"""Rewards to compare metagradients with: the naive one of the paper, likeness to wanted texts, and controls."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpg.judge import Judge
from dpg.metrics import ParamsMetric, TargetMetric
from dpg.reward import Reward, Scores, interleaved, inverse_groups
from dpg.target import Target
from dpg.text import encode

Likeness = Callable[[list[str]], Float[Tensor, " texts"]]


@dataclass(frozen=True)
class NaiveReward(Reward):
    """Φ of the whole data set for each of its texts [thrush2026].

    The texts are split as without cross-group batching: with groups of G there are G data sets, so only G different
    rewards. Texts of one prompt would be compared with one another's data sets; all texts are compared together
    instead (`groupless`), as the paper does.
    """

    target: Target
    metric: TargetMetric | ParamsMetric
    groupless = True

    def __post_init__(self) -> None:
        _ = self.judge

    @cached_property
    def judge(self) -> Judge:
        """The target and the metric."""
        return Judge(self.target, self.metric)

    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        parts = inverse_groups(texts, group_size)
        trained = [self.target.fine_tune(part) for part in parts]
        phis = [self.judge.phi(params) for params in trained]
        rewards = [torch.full((len(part),), phi) for part, phi in zip(parts, phis, strict=True)]
        return Scores(interleaved(rewards), fmean(phis), trained[0])


@dataclass(frozen=True)
class ShuffledReward(Reward):
    """A control: the rewards of `reward`, dealt to the texts of the batch at random."""

    reward: Reward

    @property
    def judge(self) -> Judge | None:
        """That of the reward."""
        return self.reward.judge

    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        scores = self.reward.score(texts, group_size)
        return scores._replace(rewards=scores.rewards[torch.randperm(len(texts))])


@dataclass(frozen=True)
class RandomReward(Reward):
    """A control: rewards that are normal random numbers."""

    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        return Scores(torch.randn(len(texts)), None, None)


@dataclass(frozen=True)
class LikenessReward(Reward):
    """How much each text is like the texts one wishes for; no target is trained."""

    likeness: Likeness

    def score(self, texts: list[str], group_size: int | None = None) -> Scores:
        return Scores(self.likeness(texts), None, None)


def edit_likeness(wanted: list[str], tokenizer: PreTrainedTokenizerBase) -> Likeness:
    """Minus the mean edit distance, in tokens, to the wanted texts."""
    references = tokenizer(wanted, verbose=False)["input_ids"]

    def likeness(texts: list[str]) -> Float[Tensor, " texts"]:
        rows = tokenizer(texts, verbose=False)["input_ids"]
        return torch.tensor([-fmean(Levenshtein.distance(row, other) for other in references) for row in rows])

    return likeness


def embedding_likeness(
    wanted: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Likeness:
    """The mean cosine between a text's embedding and those of the wanted texts.

    An embedding is the mean of the last hidden states of `model` over the tokens of the text.
    """
    references = F.normalize(_embeddings(wanted, model, tokenizer, sequence_length), dim=1)

    def likeness(texts: list[str]) -> Float[Tensor, " texts"]:
        embeddings = F.normalize(_embeddings(texts, model, tokenizer, sequence_length), dim=1)
        return reduce(embeddings @ references.T, "texts wanted -> texts", "mean").cpu()

    return likeness


@torch.no_grad()
def _embeddings(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Float[Tensor, "texts hidden"]:
    batch = encode(texts, tokenizer, sequence_length)
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    mask = rearrange(inputs["attention_mask"], "texts tokens -> texts tokens 1")
    return reduce(states * mask, "texts tokens hidden -> texts hidden", "sum") / mask.sum(dim=1)
