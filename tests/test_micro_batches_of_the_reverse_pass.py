"""The reverse pass may cut a batch elsewhere than the forward run, if each loss is a function of its example alone."""

import pytest
import torch
from agreement import assert_agree
from optimizers import OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS

import metagrad as mg


@pytest.mark.parametrize("microbatch_size, reverse", [(None, 1), (None, 3), (2, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("problem", [PROBLEMS["mlp"], ODD_PROBLEMS["shared"]], ids=["mlp", "shared"])
@pytest.mark.parametrize("wrt_params", [True, False])
def test_the_numbers_are_those_of_one_cut(problem, microbatch_size, reverse, wrt_params):
    whole, cut = (
        mg.metagradient(*problem(4).arguments(OPTIMIZERS["adamw"], **options), wrt_params=wrt_params)
        for options in ({}, {"microbatch_size": microbatch_size, "reverse_microbatch_size": reverse})
    )
    assert_agree(cut, whole, rtol=1e-11)


def test_the_loss_sees_the_pieces_that_were_asked_for():
    sizes = []

    def loss(params, batch):
        sizes.append(len(batch["x"]))
        return torch.tanh(batch["x"] * params["w"]).square()

    step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.1), microbatch_size=4, reverse_microbatch_size=2)
    batch = {"x": torch.ones(4), "index": torch.arange(4)}
    metric = lambda state: state.params["w"] ** 2  # noqa: E731
    mg.metagradient(metric, step, {"w": torch.ones(())}, [batch] * 2, {"weights": torch.ones(4)}, wrt_params=True)
    # Step 0, the look whether its gradient is the same in pieces, step 1; for each step another look, and its pullback.
    assert sizes == [4, 2, 2, 4, *[2, 2, 2, 2] * 2]


class Company(torch.nn.Module):
    """Batch norm, with running statistics or without."""

    def __init__(self, track):
        super().__init__()
        self.norm, self.out = torch.nn.BatchNorm1d(3, track_running_stats=track), torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(x)))[:, 0]


def dropout(params, batch):
    return torch.nn.functional.dropout(batch["x"] @ params["out.weight"].T, 0.5)[:, 0].square()


@pytest.mark.parametrize(
    "model, loss, reason",
    [
        (Company(track=True), None, "changes buffer 'norm.running_mean'"),
        (Company(track=False), None, "as under batch norm"),
        (torch.nn.ModuleDict({"out": torch.nn.Linear(3, 1)}), dropout, "draws random numbers"),
    ],
    ids=["running statistics", "batch statistics", "dropout"],
)
def test_examples_that_depend_on_each_other_are_refused(model, loss, reason):
    def own(params, batch):
        return torch.func.functional_call(model, params, (batch["x"],)).square()

    step = mg.TrainStep(mg.weighted(loss or own), mg.optim.sgd(0.1), reverse_microbatch_size=2)
    batch = {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), "index": torch.arange(4)}
    metric = lambda state: state.params["out.weight"].sum()  # noqa: E731
    with pytest.raises(ValueError, match=f"reverse_microbatch_size.*{reason}"):
        mg.metagradient(metric, step, model, [batch] * 2, {"weights": torch.ones(4)})


def gate(params, batch):
    """Equal losses at first, and another gradient."""
    h = batch["x"] @ params["w"]
    return (h - params["gate"] * h.mean()).square()


def late(params, batch):
    """Company from step 1 on."""
    h = batch["x"] @ params["w"]
    return (h - params["gate"].cos() * batch["late"] * h.mean()).square()


def late_dropout(params, batch):
    h = batch["x"] @ params["w"] + params["gate"]
    return (torch.nn.functional.dropout(h, 0.5) if batch["late"][0] > 0 else h).square()


@pytest.mark.parametrize("loss, step", [(gate, 0), (late, 2), (late_dropout, 2)])
def test_company_is_seen_in_the_gradient_and_at_every_step(loss, step):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    batches = [{"x": x, "late": torch.full((4,), float(t > 0)), "index": torch.arange(4)} for t in range(3)]
    train = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.1), reverse_microbatch_size=2)
    params = {"w": torch.ones(3), "gate": torch.zeros(())}
    with pytest.raises(ValueError, match=f"depends on the others of its micro-batch .* at step {step}"):
        mg.metagradient(lambda s: s.params["w"].sum(), train, params, batches, {"weights": torch.ones(4)})


@pytest.mark.parametrize("name", ["microbatch_size", "reverse_microbatch_size"])
def test_a_size_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0"):
        mg.TrainStep(lambda p, b, m: p["w"], mg.optim.sgd(0.1), **{name: 0})
