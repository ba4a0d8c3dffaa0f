"""How close two metagradients are."""

import torch
from torch import Tensor

import metagrad as mg


def relative_error(left: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of `right`; infinite where only `right` is zero."""
    difference = float(torch.linalg.vector_norm((left - right).detach()))
    size = float(torch.linalg.vector_norm(right.detach()))
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def gradients(result: mg.Result) -> dict[str, Tensor]:
    """All gradients of a result by name."""
    return {**result.meta, **(result.params or {})}


def assert_agree(left: mg.Result, right: mg.Result, rtol: float) -> None:
    """Φ and every gradient, tensor by tensor."""
    assert gradients(left).keys() == gradients(right).keys()
    errors = {name: relative_error(gradients(left)[name], wanted) for name, wanted in gradients(right).items()}
    errors["value"] = relative_error(left.value, right.value)
    assert max(errors.values()) <= rtol, errors


def assert_same_bits(left: mg.Result, right: mg.Result) -> None:
    """Φ, every gradient and the trained parameters, bit for bit."""
    assert torch.equal(left.value, right.value)
    for name, wanted in gradients(right).items():
        assert torch.equal(gradients(left)[name], wanted), name
    for name, wanted in right.state.params.items():
        assert torch.equal(left.state.params[name], wanted), name
