"""The dot-product test of a step: right steps pass, and a hidden part of a derivative is located."""

from dataclasses import dataclass

import pytest
import torch
from optimizers import OPTIMIZERS
from problems import PROBLEMS

import metagrad as mg


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2"])
def test_right_steps_pass(name, optimizer, at):
    _, *rest = PROBLEMS[name](3).arguments(OPTIMIZERS[optimizer], microbatch_size=2, clip_norm=0.1)
    found = mg.check.step_adjoint(*rest, at=at)
    assert [row.verdict for row in found.rows] == ["agree"] * len(found.rows)
    assert {row.name for row in found.rows} >= {"state.params", "meta['weights']"}
    # An agreement counts only where there is a derivative, to at least one part in 10⁴.
    assert all(row.error < 1e-4 * abs(row.difference) for row in found.rows)
    assert found.culprits == [] and f"step {at} is the adjoint" in str(found)


def detached_input(p, b, meta):
    return (torch.tanh(b["x"] @ p["a"].detach()) @ p["c"] + torch.tanh(b["x"] @ p["a"]).sum(1)) ** 2


DETACHED = {
    "a parameter": (detached_input, ["state.params['a']"]),
    "a metaparameter": (
        lambda p, b, meta: (torch.tanh(b["x"] @ p["a"]) @ p["c"]) ** 2 * meta["scale"].detach(),
        ["meta['scale']"],
    ),
    "through .data": (
        lambda p, b, meta: (torch.tanh(b["x"] @ p["a"]) @ p["c"]) ** 2 * (meta["scale"] * p["c"].data.norm()),
        ["state.params['c']"],
    ),
}


@pytest.mark.parametrize("case", DETACHED)
def test_a_detach_inside_the_loss_is_located(case):
    loss, culprits = DETACHED[case]
    draw = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(3, 4, generator=draw), "c": torch.randn(4, generator=draw)}
    batches = [{"x": torch.randn(5, 3, generator=draw)}] * 3
    step = mg.TrainStep(loss, mg.optim.sgd(0.05, momentum=0.5))
    run = step, params, batches, {"scale": torch.tensor(0.7)}
    found = mg.check.step_adjoint(*run, at=1)
    assert found.verdict == "disagree" and found.culprits == culprits
    assert culprits[0] in str(found)
    metric = lambda state: state.params["c"].square().sum()  # noqa: E731  # named for the two calls
    result = mg.metagradient(metric, *run, wrt_params=True)
    assert mg.check.finite_differences(metric, *run, wrt_params=True).compare(result).verdict == "disagree"


@dataclass(frozen=True)
class HeavyBall:
    """Momentum written by hand, with `init` and `__call__` alone; `forget` hides the old velocity's derivative."""

    forget: bool = False

    def init(self, params, meta):
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return mg.State(params, {}, zeros, (), 0)

    def __call__(self, state, batch, meta):
        noise = torch.rand(())  # Random numbers are the same at every call.
        loss = ((batch["x"] @ state.params["a"]).tanh() @ state.params["c"] + noise).square().mean()
        gradient = dict(
            zip(
                state.params,
                torch.autograd.grad(loss, list(state.params.values()), create_graph=True),
                strict=True,
            )
        )
        velocity = {
            name: 0.9 * (old.detach() if self.forget else old) + gradient[name] for name, old in state.optimizer.items()
        }
        params = {name: value - meta["lr"] * velocity[name] for name, value in state.params.items()}
        return state._replace(params=params, optimizer=velocity)


def by_hand(forget):
    draw = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(3, 4, generator=draw), "c": torch.randn(4, generator=draw)}
    batches = [{"x": torch.randn(5, 3, generator=draw)} for _ in range(3)]
    return HeavyBall(forget), params, batches, {"lr": torch.tensor(0.05)}


@pytest.mark.parametrize("at", [0, 2])
def test_a_step_without_a_pullback_is_tested_by_autograd(at):
    assert mg.check.step_adjoint(*by_hand(forget=False), at=at).verdict == "agree"
    found = mg.check.step_adjoint(*by_hand(forget=True), at=at)
    assert [row.name for row in found.rows if row.verdict == "disagree"] == ["state.optimizer"]
    assert found.culprits == ["state.optimizer['a']", "state.optimizer['c']"]


def test_a_step_without_a_pullback_passes_the_other_referees():
    metric = lambda state: state.params["a"].square().sum()  # noqa: E731  # named for the two calls
    right, wrong = by_hand(forget=False), by_hand(forget=True)
    mg.check.determinism(*right)
    differences = mg.check.finite_differences(metric, *right, wrt_params=True)
    assert differences.compare(mg.check.unrolled(metric, *right, wrt_params=True)).verdict == "agree"
    assert differences.compare(mg.check.unrolled(metric, *wrong, wrt_params=True)).verdict == "disagree"
    assert float(mg.check.metasmoothness(metric, *right, step_sizes=1e-4).agreement.min()) > 0.99
