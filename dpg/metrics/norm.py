"""A target whose weights should shrink: minus the norm of one parameter after training."""

import difflib
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpg.metrics.metric import Bound, Params, TargetMetric, head_name


@dataclass(frozen=True)
class WeightNorm(TargetMetric):
    """Minus the Frobenius norm of one parameter after training [thrush2026]: Φ = −‖W_T‖.

    The figures are `norm` and `norm_drop`, which is ‖W_0‖ − ‖W_T‖.

    Args:
        parameter: its name in the target; None for the LM head, also if that is tied to the embedding.

    Raises:
        ValueError: by `bind`, if the target trains no such parameter.
    """

    parameter: str | None = None

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bound:
        name = head_name(model) if self.parameter is None else self.parameter
        initial = _norm(_checked(model, name))

        def phi(params: Params) -> Float[Tensor, ""]:
            return -params[name].norm()

        def measure(params: Params) -> dict[str, float]:
            norm = _norm(params[name])
            return {"norm": norm, "norm_drop": initial - norm}

        return Bound(phi, measure)


def _norm(weight: Tensor) -> float:
    # In double precision: training changes a norm by less than float32 resolves.
    return float(weight.detach().double().norm())


def _checked(model: PreTrainedModel, name: str) -> Tensor:
    parameters = dict(model.named_parameters())
    if name not in parameters:
        close = difflib.get_close_matches(name, parameters, n=3, cutoff=0.3) or sorted(parameters)[:3]
        raise ValueError(
            f"{type(model).__name__} has no parameter {name!r}. Close names are {', '.join(map(repr, close))}; "
            "`model.named_parameters()` lists all."
        )
    return parameters[name]
