"""Exact data attribution [ilyas2025]: what each training example did to a metric, and a proof by retraining."""

from metagrad.attribution._lds import LinearDatamodelingScore, linear_datamodeling_score, spearman
from metagrad.attribution._retrain import random_subsets, retrain
from metagrad.attribution._scores import Scores, scores

__all__ = [
    "LinearDatamodelingScore",
    "Scores",
    "linear_datamodeling_score",
    "random_subsets",
    "retrain",
    "scores",
    "spearman",
]
