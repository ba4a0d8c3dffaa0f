"""Contract 5: same inputs, same bits; nothing remembered, nothing changed in place; and the referee that checks it."""

from itertools import product

import optree
import pytest
import torch
import torchopt
from agreement import assert_same_bits
from optimizers import ALL_OPTIMIZERS, OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS
from torch import Tensor, nn
from torch.func import functional_call

import metagrad as mg

ALL_PROBLEMS = {**PROBLEMS, **ODD_PROBLEMS}


def tensors_of(problem) -> list[Tensor]:
    model = problem.params
    params = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else [*model.values()]
    return [*params, *optree.tree_leaves((problem.batches, problem.meta))]


@pytest.mark.parametrize("name", ALL_PROBLEMS)
def test_a_metagradient_changes_nothing_and_repeats_itself(name):
    problem = ALL_PROBLEMS[name](3)
    arguments = problem.arguments(OPTIMIZERS["momentum"], microbatch_size=2)
    before = [tensor.detach().clone() for tensor in tensors_of(problem)]
    torch.manual_seed(1)
    first = mg.metagradient(*arguments, wrt_params=True)
    torch.manual_seed(2)
    assert_same_bits(mg.metagradient(*arguments, wrt_params=True), first)
    for old, new in zip(before, tensors_of(problem), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_a_metric_in_training_mode_does_not_change_the_trained_buffers():
    problem = PROBLEMS["cnn"](2)
    _, *rest = problem.arguments(OPTIMIZERS["sgd"])

    def metric(state):
        buffers = {name: buffer.detach() for name, buffer in state.buffers.items()}
        return functional_call(problem.params, {**state.params, **buffers}, (problem.batches[0]["x"],)).sum()

    trained = mg.metagradient(metric, *rest).state.buffers
    assert int(trained["norm.num_batches_tracked"]) == 2
    assert torch.equal(trained["norm.running_mean"], mg.train(*rest).buffers["norm.running_mean"])


@pytest.mark.parametrize("name", ["cnn", "gpt2"])  # the ones with dropout
def test_the_random_numbers_of_the_caller_are_left_alone(name):
    metric, step, params, batches, meta = PROBLEMS[name](3).arguments(OPTIMIZERS["sgd"])
    before = torch.get_rng_state()
    mg.metagradient(metric, step, params, batches, meta)
    mg.check.determinism(step, params, batches, meta)
    meta = {"weights": meta["weights"].clone().requires_grad_()}
    metric(mg.train(step, {n: p.detach() for n, p in params.named_parameters()}, batches, meta)).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_dropout_and_steps_draw_anew():
    def end(seed: int) -> float:
        step = mg.TrainStep(lambda p, b, meta: torch.rand(4) * p["w"], mg.optim.sgd(1.0), seed=seed)
        return float(mg.train(step, {"w": torch.tensor(0.0)}, [torch.ones(1)] * 2, {}).params["w"])

    # At each step the gradient is the mean of four numbers, all drawn from one stream.
    generator = torch.Generator().manual_seed(0)
    assert end(0) == pytest.approx(-sum(float(torch.rand(4, generator=generator).mean()) for _ in range(2)), rel=1e-14)
    assert end(1) != end(0)


@pytest.mark.parametrize(
    "name, optimizer",
    [*product(ALL_PROBLEMS, OPTIMIZERS), *product(["mlp"], sorted(ALL_OPTIMIZERS.keys() - OPTIMIZERS))],
)
def test_good_steps_pass_the_referee(name, optimizer):
    _, *rest = ALL_PROBLEMS[name](2).arguments(ALL_OPTIMIZERS[optimizer], microbatch_size=2, clip_norm=0.1)
    mg.check.determinism(*rest)


# Steps that are not pure. Each goes wrong at step 1 or later, and the referee must say where.


def regression(loss, optimizer=OPTIMIZERS["sgd"], batches=None):
    batches = batches or [{"x": torch.tensor([1.0, 2.0])}] * 3
    return mg.TrainStep(lambda p, b, meta: loss(p, b), optimizer), {"w": torch.tensor(0.5)}, batches, {}


def test_a_loss_with_hidden_state_is_named():
    calls = []

    def loss(params, batch):
        calls.append(batch)
        return (params["w"] * batch["x"] - float(len(calls) > 3)) ** 2  # The fourth call is the second run of step 1.

    with pytest.raises(
        mg.ReplayMismatchError, match=r"at step 1, state\.params\['w'\] differs between two runs.*remembers something"
    ):
        mg.check.determinism(*regression(loss))


def test_a_step_in_place_is_named():
    calls = []

    def loss(params, batch):
        calls.append(batch)
        if len(calls) > 4:  # from step 2 on
            params["w"].data.mul_(0.5)
        return (params["w"] * batch["x"]) ** 2

    with pytest.raises(mg.ReplayMismatchError, match=r"at step 2, state\.params\['w'\] was changed in place"):
        mg.check.determinism(*regression(loss))


def test_a_batch_changed_in_place_is_named():
    def loss(params, batch):
        return (params["w"] * batch["x"].mul_(2)) ** 2

    with pytest.raises(ValueError, match=r"the loss changed batch\['x'\] in place"):
        mg.check.determinism(*regression(loss))


def test_a_batch_that_is_another_at_the_next_reading_is_named():
    class Augmented:
        readings = 0

        def __len__(self):
            return 3

        def __getitem__(self, step):
            self.readings += step  # Step 0 is always the same.
            return {"x": torch.tensor([1.0, 2.0 + self.readings])}

    with pytest.raises(mg.ReplayMismatchError, match=r"at step 1, batch\['x'\] changed between two readings"):
        mg.check.determinism(*regression(lambda p, b: (p["w"] * b["x"]) ** 2, batches=Augmented()))


def test_an_optimizer_that_remembers_later_is_named():
    """What passes its proof at the start may still go wrong: it is the referee that sees the run."""
    calls = []

    def update(updates, state, *, params, inplace):
        calls.append(updates)
        return {name: -0.1 * u * (1.0 + (len(calls) > 39)) for name, u in updates.items()}, state

    optimizer = torchopt.base.GradientTransformation(lambda params: (), update)
    with pytest.raises(mg.ReplayMismatchError, match="at step 1, .*differs between two runs"):
        mg.check.determinism(*regression(lambda p, b: (p["w"] * b["x"]) ** 2, optimizer))
