"""Six cases in which the strongest peer of this library gives a wrong metagradient or another run, each by its name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agreement import relative_error
from optimizers import SMOOTH
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import metagrad as mg

ROOT = Path(__file__).parent.parent


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    """A bigram model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.head.weight.copy_(0.5 * drawn(6, 3))

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("optimizer", [mg.optim.sgd(0.3), mg.optim.adamw(0.05, **SMOOTH)], ids=["sgd", "adamw"])
def test_tied_weights(optimizer):
    model, generator = Tied(), torch.Generator().manual_seed(1)
    tokens = torch.randint(6, (5, 4, 2), generator=generator)
    batches = [{"index": torch.arange(4), "tokens": batch} for batch in tokens]
    meta = {"weights": 1 + 0.2 * drawn(4, seed=2)}

    def loss(params, batch):
        logits = functional_call(model, params, (batch["tokens"][:, 0],))
        return cross_entropy(logits, batch["tokens"][:, 1], reduction="none")

    def by_hand(params, batch):
        table = params["embedding.weight"]
        logits = torch.tanh(table[batch["tokens"][:, 0]]) @ table.T
        return -logits.log_softmax(1).gather(1, batch["tokens"][:, 1:]).squeeze(1)

    def metric(state):
        return loss(state.params, batches[0]).mean()

    step = mg.TrainStep(mg.weighted(loss), optimizer)
    result = mg.metagradient(metric, step, model, batches, meta, wrt_params=True)
    assert list(result.params) == ["embedding.weight"]
    differences = mg.check.finite_differences(metric, step, model, batches, meta, wrt_params=True)
    assert differences.relative_error(result).max() <= 1e-6
    start = {"embedding.weight": model.embedding.weight.detach()}
    plain = mg.TrainStep(mg.weighted(by_hand), optimizer)
    other = mg.metagradient(metric, plain, start, batches, meta, wrt_params=True)
    assert relative_error(result.meta["weights"], other.meta["weights"]) <= 1e-12
    assert relative_error(result.params["embedding.weight"], other.params["embedding.weight"]) <= 1e-12


CONTINUE = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import metagrad as mg
from test_where_peers_are_wrong import momentum_and_muon
step, params, batches, meta = momentum_and_muon({name!r})
state = step.init(params, meta)
saved = torch.load({path!r}, weights_only=True)
state = state._replace(params=saved["params"], optimizer=torch.utils._pytree.tree_unflatten(
    saved["optimizer"], torch.utils._pytree.tree_structure(state.optimizer)))
torch.save(mg.train(step, state, batches[3:], meta).params, {path!r})
"""


def momentum_and_muon(name):
    """A run of six steps with an optimizer that peers cannot continue in a fresh process."""
    optimizer = {
        "momentum": mg.optim.sgd(0.05, momentum=0.9, dampening=0.4),
        "muon": mg.optim.muon(0.02, others=mg.optim.adamw(0.02, **SMOOTH)),
    }[name]
    params = {"a": 0.5 * drawn(3, 4), "b": torch.zeros(4), "c": 0.5 * drawn(4, 1, seed=1)}

    def loss(params, batch):
        return (torch.tanh(batch["x"] @ params["a"] + params["b"]) @ params["c"]).squeeze(1).square()

    batches = [{"index": torch.arange(4), "x": x} for x in drawn(6, 4, 3, seed=2)]
    return mg.TrainStep(mg.weighted(loss), optimizer), params, batches, {"weights": torch.ones(4)}


@pytest.mark.parametrize("name", ["momentum", "muon"])
def test_resume_with_momentum_and_muon(name, tmp_path):
    step, params, batches, meta = momentum_and_muon(name)
    middle = mg.train(step, params, batches[:3], meta)
    path = str(tmp_path / "state.pt")
    torch.save({"params": middle.params, "optimizer": torch.utils._pytree.tree_leaves(middle.optimizer)}, path)
    program = CONTINUE.format(root=str(ROOT), tests=str(ROOT / "tests"), name=name, path=path)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
    continued, whole = torch.load(path, weights_only=True), mg.train(step, params, batches, meta).params
    assert all(torch.equal(continued[key], whole[key]) for key in whole)


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 4, 5])
def test_sum_of_means_accumulation(microbatch_size):
    """Examples of unequal length, each the mean over its own tokens: pieces add up to the whole, scale included."""
    x, mask = drawn(5, 6, seed=1), torch.arange(6) < torch.tensor([[6], [2], [4], [1], [3]])

    def loss(params, batch):
        errors = torch.sin(params["w"] * batch["x"]) * batch["mask"]
        return errors.sum(1) / batch["mask"].sum(1)

    def gradients(size):
        step = mg.TrainStep(mg.weighted(loss), mg.optim.adam(0.1, **SMOOTH), microbatch_size=size)
        batch = {"index": torch.arange(5), "x": x, "mask": mask}
        return mg.metagradient(
            lambda s: s.params["w"].sum() ** 3,
            step,
            {"w": drawn(6, seed=2)},
            [batch] * 4,
            {"weights": 1 + 0.1 * drawn(5, seed=3)},
            wrt_params=True,
        )

    whole, pieces = gradients(None), gradients(microbatch_size)
    assert relative_error(pieces.meta["weights"], whole.meta["weights"]) <= 1e-12
    assert relative_error(pieces.params["w"], whole.params["w"]) <= 1e-12


def test_weight_decay_of_muon():
    """With a linear loss the gradient is constant, so θ' = (1 − lr · decay) θ + constant, and dθ'/dθ is known."""
    lr, decay, direction = 0.1, torch.tensor(0.5), drawn(3, 4, seed=1)
    theta = drawn(3, 4)
    step = mg.TrainStep(
        lambda params, batch, meta: (params["w"] * batch).sum(),
        lambda meta: mg.optim.muon(lr, weight_decay=meta["decay"]),
    )
    probe = drawn(3, 4, seed=2)
    result = mg.metagradient(
        lambda s: (s.params["w"] * probe).sum(), step, {"w": theta}, [direction], {"decay": decay}, wrt_params=True
    )
    assert relative_error(result.params["w"], 0.95 * probe) <= 1e-14
    assert relative_error(result.meta["decay"], -lr * (theta * probe).sum()) <= 1e-14


def test_batch_norm_statistics_in_the_metric():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).train()
    judge = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).eval()
    x, y = drawn(8, 3, seed=1), drawn(8, 1, seed=2)
    batches = [{"index": i, "x": x[i], "y": y[i]} for i in torch.arange(8).roll(3).split(4)] * 3

    def metric(state):
        return mse_loss(functional_call(judge, {**state.params, **state.buffers}, (x,)), y)

    step = mg.TrainStep(
        mg.weighted(lambda p, b: (functional_call(model, p, (b["x"],)) - b["y"]).square().squeeze(1)),
        mg.optim.adamw(0.05, **SMOOTH),
    )
    arguments = metric, step, model, batches, {"weights": torch.ones(8)}
    result = mg.metagradient(*arguments, schedule=mg.Binomial(2), wrt_params=True)
    assert mg.check.finite_differences(*arguments, wrt_params=True).relative_error(result).max() <= 1e-6


def test_clipping_with_an_unused_parameter():
    params = {"w": drawn(3), "idle": drawn(2, seed=1)}
    batches = [{"index": torch.arange(2), "x": x} for x in drawn(4, 2, 3, seed=2)]
    step = mg.TrainStep(mg.weighted(lambda p, b: (b["x"] @ p["w"] - 1).square()), mg.optim.sgd(0.2, 0.5), clip_norm=0.1)
    arguments = (
        lambda s: s.params["w"].square().sum() + s.params["idle"].sum() ** 2,
        step,
        params,
        batches,
        {"weights": torch.ones(2)},
    )
    result = mg.metagradient(*arguments, wrt_params=True)
    assert torch.equal(result.params["idle"], (2 * params["idle"].sum()).expand(2))
    assert mg.check.finite_differences(*arguments, wrt_params=True).relative_error(result).max() <= 1e-6
