"""What training the target on some texts comes to: Φ, and figures a person reads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from dpg.metrics import Bound, Params, ParamsMetric, TargetMetric, bind
from dpg.target import Target


@dataclass(frozen=True)
class Judge:
    """A target and what it should become.

    Args:
        target: the model that trains on texts.
        metric: a `TargetMetric`, or any function of the trained parameters that returns a scalar.
        measure_texts: figures of the texts themselves.

    Raises:
        ValueError: if the metric does not fit the target.
    """

    target: Target
    metric: TargetMetric | ParamsMetric
    measure_texts: Callable[[list[str]], dict[str, float]] = lambda texts: {}

    def __post_init__(self) -> None:
        _ = self.bound

    @cached_property
    def bound(self) -> Bound:
        """The metric of this target."""
        return bind(self.metric, self.target.model, self.target.tokenizer)

    def phi(self, params: Params) -> float:
        """Φ of trained parameters."""
        with torch.no_grad():
            return float(self.bound.phi(params))

    def measures(self, params: Params, texts: list[str]) -> dict[str, float]:
        """The figures of a target trained on `texts` to `params`."""
        return {**self.bound.measure(params), **self.measure_texts(texts)}

    def trial(self, texts: list[str]) -> dict[str, float]:
        """Train a target on `texts`: `phi` and every figure."""
        params = self.target.fine_tune(texts)
        return {"phi": self.phi(params), **self.measures(params, texts)}
