"""The parts that every metric shares: what one is, and how it meets a target."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Params: TypeAlias = dict[str, Tensor]
ParamsMetric: TypeAlias = Callable[[Params], Float[Tensor, ""]]


class Bound(NamedTuple):
    """A metric of one model.

    Attributes:
        phi: Φ of the trained parameters, differentiable.
        measure: readable figures of the trained parameters, by name.
    """

    phi: ParamsMetric
    measure: Callable[[Params], dict[str, float]]


class TargetMetric(ABC):
    """A metric that looks at the target before it is trained, and has figures a person reads."""

    @abstractmethod
    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bound:
        """The metric of the trained parameters of `model`.

        Raises:
            ValueError: if it does not fit the model, before anything is trained.
        """


def bind(metric: TargetMetric | ParamsMetric, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bound:
    """Any metric, bound to a target; a plain function has no figures but Φ.

    Raises:
        ValueError: if it does not fit the model, is no scalar, or does not depend on the trained parameters.
    """
    bound = metric.bind(model, tokenizer) if isinstance(metric, TargetMetric) else Bound(metric, lambda params: {})
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    with torch.enable_grad():
        value = bound.phi(_Trained(params))
    if not isinstance(value, Tensor) or value.ndim != 0:
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise ValueError(f"the metric returned {given}. Return a scalar tensor: one number, higher is better.")
    if not value.requires_grad:
        raise ValueError(
            "the metric does not depend on the trained parameters, so no text could change it. Compute it from the "
            "tensors in `params` (not from the model's own, and without `.item()`, `.detach()` or `no_grad`)."
        )
    return bound


class _Trained(dict[str, Tensor]):
    """Parameters by name; a name that is not among them is refused with close ones."""

    def __missing__(self, name: str) -> Tensor:
        close = difflib.get_close_matches(name, self, n=3, cutoff=0.3) or sorted(self)[:3]
        raise ValueError(
            f"the metric asks for {name!r}, which the target does not train. Close names are "
            f"{', '.join(map(repr, close))}. (A tied head has the name of the embedding: --set untie_head=true.)"
        )


def head(model: PreTrainedModel) -> Float[Tensor, "vocabulary hidden"]:
    """The weight of the LM head."""
    return model.get_output_embeddings().weight


def head_name(model: PreTrainedModel) -> str:
    """The name under which the LM head's weight is trained."""
    return next(name for name, parameter in model.named_parameters() if parameter is head(model))
