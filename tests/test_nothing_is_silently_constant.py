"""What would be taken as a constant, changed unseen or lost is refused by name, or is the constant it should be."""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from agreement import relative_error
from torch import nn
from torch.func import functional_call

import metagrad as mg


def metric(state):
    return (state.params["w"] ** 2).sum()


class Own:
    """Descent on a quadratic, with something wrong in its state or its step."""

    def __init__(self, wrong=None):
        self.wrong = wrong

    def init(self, params, meta):
        extra = {
            "opaque": Velocity(torch.zeros(3)),
            "complex": {"v": torch.zeros(3, dtype=torch.complex128)},
            "count": {"n": torch.zeros((), dtype=torch.int64)},
            "average": {"mean": params["w"].clone()},
        }
        return mg.State(params, optimizer=extra.get(self.wrong, ()))

    def __call__(self, state, batch, meta):
        w = state.params["w"]
        if self.wrong == "count":
            state.optimizer["n"].add_(1)
        if self.wrong == "batch":
            batch.mul_(2)
        (gradient,) = torch.autograd.grad(((w - batch) ** 2).sum(), w, create_graph=True)
        return state._replace(params={"w": w - meta["lr"] * gradient})


@dataclass
class Velocity:
    v: torch.Tensor


def arguments(wrong=None, num_steps=4):
    batches = list(torch.randn(num_steps, 3, generator=torch.Generator().manual_seed(0)))
    return Own(wrong), {"w": torch.ones(3)}, batches, {"lr": torch.tensor(0.1)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("opaque", r"optimizer is a Velocity, which would be taken as a constant"),
        ("complex", r"optimizer\['v'\] is a complex128 tensor.*constant"),
        ("count", r"Own changed state\.optimizer\['n'\] in place"),
        ("batch", r"Own changed batch in place"),
    ],
)
def test_a_step_with_such_a_state_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        mg.metagradient(metric, *arguments(wrong))


def test_a_loss_or_a_metric_that_changes_what_it_is_given_is_refused():
    _, params, batches, meta = arguments()

    def changed(state):
        with torch.no_grad():
            state.params["w"].add_(1)
        return metric(state)

    with pytest.raises(ValueError, match=r"the metric changed state\.params\['w'\] in place"):
        mg.metagradient(changed, *arguments())

    def loss(params, batch, meta):
        batch.add_(1)
        return (params["w"] - batch).square().sum()

    step = mg.TrainStep(loss, mg.optim.sgd(0.1))
    with pytest.raises(ValueError, match="the loss changed batch in place"):
        mg.metagradient(metric, step, params, batches, meta)


def test_an_initial_state_computed_from_parameters_is_refused_by_train():
    step, params, batches, meta = arguments("average")
    leaf = {"w": params["w"].clone().requires_grad_()}
    with pytest.raises(ValueError, match="computes a part of the initial state from parameters.*mg.State"):
        mg.train(step, leaf, batches, meta)
    assert mg.metagradient(metric, step, params, batches, meta).meta["lr"] != 0


class Average(nn.Module):
    """A buffer moved under torch.no_grad, as running averages often are."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.3]))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        hidden = self.w * x
        with torch.no_grad():
            self.scale.mul_(0.5).add_(0.5 * hidden.abs().mean(0))
        return (hidden / self.scale).square().sum(1)


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_a_buffer_moved_under_no_grad_is_refused_or_a_constant(microbatch_size):
    model, calls = Average(), []

    def loss(params, batch):
        calls.append(1)
        return functional_call(model, params, (batch["x"],))

    batches = [{"x": torch.tensor([[1.0, 2.0], [-0.5, 1.0]]), "index": torch.arange(2)}] * 5
    run = model, batches, {"weights": torch.ones(2)}

    def steps(**options):
        return mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.05), microbatch_size=microbatch_size, **options)

    with pytest.raises(ValueError, match="buffer 'scale' is changed under torch.no_grad.*constant_buffers=True"):
        mg.metagradient(lambda s: s.params["w"].sum(), steps(), *run)
    assert len(calls) == 1
    constant = steps(constant_buffers=True)
    result = mg.metagradient(lambda s: s.params["w"].sum() + s.buffers["scale"].sum(), constant, *run, wrt_params=True)
    assert torch.equal(result.buffers["scale"], torch.zeros(2))
    assert result.meta["weights"].abs().min() > 0


class Fresh:
    """Batches drawn anew at each reading."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return 4

    def __getitem__(self, step):
        return torch.randn(3, generator=self.generator)


@pytest.mark.parametrize("schedule", [mg.EveryStep(), mg.Binomial(1)])
def test_batches_that_differ_between_readings_are_found(schedule):
    step, params, _, meta = arguments()
    with pytest.raises(mg.ReplayMismatchError, match="batch of step . is another than when it was read first"):
        mg.metagradient(metric, step, params, Fresh(), meta, schedule=schedule)


@pytest.mark.parametrize(
    "first, then",
    [
        (metric, mg.Trajectory({1: metric})),
        (mg.Trajectory({3: metric}), mg.Trajectory({2: metric})),
        (metric, lambda state: -7 * (state.params["w"] ** 4).sum()),
    ],
)
def test_a_folder_of_other_metrics_is_refused(tmp_path, first, then):
    step, _, batches, meta = arguments()
    run = step, {"w": torch.zeros(3)}, batches, meta  # where many metrics are alike
    mg.metagradient(first, *run, resume=tmp_path)
    with pytest.raises(mg.ResumeError, match="metric 0 was"):
        mg.metagradient(then, *run, resume=tmp_path)


def test_one_store_for_two_runs_at_a_time_is_refused():
    step, params, batches, _ = arguments()
    meta, store = {"lr": torch.tensor(0.1, requires_grad=True)}, mg.RamStore()
    mg.train(step, params, batches, meta, store=store)
    with pytest.raises(ValueError, match="already keeps a state of step 0.*store of its own"):
        mg.train(step, params, batches, meta, store=store)


def test_one_store_after_another_counts_anew():
    store = mg.RamStore()
    sizes = [
        mg.metagradient(metric, *arguments(), schedule=schedule, store=store).stats.ram_bytes
        for schedule in (mg.EveryStep(), mg.Binomial(1))
    ]
    assert sizes[0] == 4 * sizes[1]


def test_what_cannot_be_read_by_step_is_refused():
    step, params, batches, meta = arguments()
    loader = torch.utils.data.DataLoader(torch.stack(batches))
    with pytest.raises(ValueError, match=r"DataLoader, which cannot be read at \[t\].*list\(loader\)"):
        mg.metagradient(metric, step, params, loader, meta)


@pytest.mark.parametrize("call", [mg.metagradient, mg.train], ids=lambda f: f.__name__)
def test_what_is_no_schedule_is_refused(call):
    first = (metric,) if call is mg.metagradient else ()
    with pytest.raises(ValueError, match=r"`schedule` is 8. Pass a schedule such as mg.Binomial"):
        call(*first, *arguments(), schedule=8)


def test_what_is_no_store_is_refused():
    with pytest.raises(ValueError, match="`store` is 'folder'.*DiskStore"):
        mg.metagradient(metric, *arguments(), store="folder")


def test_a_loss_after_training_reads_running_statistics_with_their_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.randn(6, 3)
    step = mg.TrainStep(mg.weighted(lambda p, b: functional_call(model, p, (b["x"],)).pow(4).sum(1)), mg.optim.sgd(0.1))
    batches, weights = [{"x": x, "index": torch.arange(6)}] * 3, torch.ones(6, requires_grad=True)

    judge = deepcopy(model).eval()

    def evaluated(state):
        return functional_call(judge, {**state.params, **state.buffers}, (x,)).square().sum()

    wanted = mg.metagradient(evaluated, step, model, batches, {"weights": weights.detach()})
    state = mg.train(step, model, batches, {"weights": weights})
    with mg.DifferentiableStatistics():
        evaluated(state).backward()
    assert wanted.meta["weights"].abs().sum() > 0
    assert relative_error(weights.grad, wanted.meta["weights"]) <= 1e-12
