"""The tests of a run over several processes; every one of them runs these.

    torchrun --nproc-per-node 2 -m pytest tests/over_ranks.py

`tests/test_ranks_are_one_process.py` does that.
"""

import tempfile
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
import torch
from agreement import assert_agree, assert_same_bits, relative_error
from optimizers import ALL_OPTIMIZERS, OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS

import metagrad as mg

# Those whose losses draw no random numbers and keep no statistics: the ranks together do what one process does.
PLAIN = {name: build for name, build in {**PROBLEMS, **ODD_PROBLEMS}.items() if name not in ("cnn", "gpt2")}
OPTIONS = [{}, {"microbatch_size": 1}, {"clip_norm": 0.1}, {"reverse_microbatch_size": 1}]


@pytest.fixture(scope="session")
def ranks():
    return mg.distributed.start(timeout=60)


def over(ranks, arguments):
    """The arguments of a metagradient, for this rank."""
    metric, step, params, batches, meta = arguments
    return metric, replace(step, ranks=ranks), params, ranks.part(batches), meta


def check(ranks, arguments):
    """As one process, and as autograd through the whole run."""
    found = mg.metagradient(*over(ranks, arguments), wrt_params=True)
    assert_agree(found, mg.metagradient(*arguments, wrt_params=True), rtol=1e-12)
    assert_agree(found, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)
    # Without the initial parameters the first step is reversed in another way.
    weights_only = mg.metagradient(*over(ranks, arguments))
    assert relative_error(weights_only.meta["weights"], found.meta["weights"]) <= 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_those_of_one_process(ranks, name, optimizer, options):
    check(ranks, PLAIN[name](4).arguments(OPTIMIZERS[optimizer], **options))


@pytest.mark.parametrize("optimizer", sorted(ALL_OPTIMIZERS.keys() - OPTIMIZERS))
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_other_optimizers_are_those_of_one_process(ranks, name, optimizer):
    check(ranks, PLAIN[name](3).arguments(ALL_OPTIMIZERS[optimizer]))


@pytest.mark.parametrize("curvature", ["auto", "forward-over-reverse", "reverse-over-forward"])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_other_second_derivatives_are_those_of_one_process(ranks, name, curvature):
    check(ranks, PLAIN[name](3).arguments(OPTIMIZERS["adamw"], curvature=curvature))


def test_hyperparameters_have_the_gradients_of_one_process(ranks):
    problem = PROBLEMS["mlp"](3)
    metric, step, params, batches, meta = problem.arguments(
        lambda meta: mg.optim.adamw(lr=meta["lr"], weight_decay=meta["decay"], eps_root=1e-3)
    )
    meta = {**meta, "lr": torch.tensor(0.02), "decay": torch.tensor(0.1)}
    check(ranks, (metric, step, params, batches, meta))


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_schedules_and_stores_change_no_bit(ranks, name):
    arguments = over(ranks, PROBLEMS[name](6).arguments(OPTIMIZERS["adamw"]))
    wanted = mg.metagradient(*arguments, schedule=mg.EveryStep(), wrt_params=True)
    for schedule in (mg.Binomial(1), mg.Binomial(3), mg.Tree(2)):
        with TemporaryDirectory() as folder:
            found = mg.metagradient(*arguments, schedule=schedule, store=mg.DiskStore(folder), wrt_params=True)
        assert_same_bits(found, wanted)


def test_metrics_share_a_replay(ranks):
    metric, *others = PROBLEMS["llama"](4).arguments(OPTIMIZERS["adamw"])
    metrics = [metric, mg.Trajectory({2: metric, 4: lambda state: state.params["lm_head.weight"].square().sum()})]
    alone = mg.metagradient(metrics, *others, wrt_params=True)
    assert_agree(mg.metagradient(*over(ranks, (metrics, *others)), wrt_params=True), alone, rtol=1e-12)


def test_training_is_a_layer(ranks):
    metric, *others = PROBLEMS["mlp"](3).arguments(OPTIMIZERS["adam"])
    exact = mg.metagradient(metric, *others)
    _, step, params, batches, meta = over(ranks, (metric, *others))
    meta["weights"] = meta["weights"].clone().requires_grad_()
    metric(mg.train(step, params, batches, meta)).backward()
    assert relative_error(meta["weights"].grad, exact.meta["weights"]) <= 1e-12


def test_dropout_has_the_gradient_of_the_run_that_was_made(ranks):
    """Every rank draws its own: compared with differences of that very run."""
    metric, step, params, batches, meta = over(ranks, PROBLEMS["gpt2"](3).arguments(OPTIMIZERS["adamw"]))
    found = mg.metagradient(metric, step, params, batches, meta).meta["weights"]

    def phi(weights):
        with torch.no_grad():
            return float(metric(mg.train(step, params, batches, {"weights": weights})))

    direction = torch.randn(len(found), generator=torch.Generator().manual_seed(0))
    ends = [phi(meta["weights"] + size * 1e-4 * direction) for size in (1, -1)]
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float(found @ direction), rel=1e-6)
    state = step.init(params, meta)
    (drawn, *_), _ = ranks.own_random(state.rng, state.params)
    first, *others = ranks.gathered(drawn, "what each draws from")
    assert not any(torch.equal(first, other) for other in others)


def test_what_differs_between_ranks_is_refused(ranks):
    metric, step, params, batches, meta = over(ranks, PROBLEMS["mlp"](2).arguments(OPTIMIZERS["sgd"]))
    own = {name: value + ranks.rank for name, value in params.items()}
    with pytest.raises(ValueError, match="the initial parameters.*differ between rank 0 and rank 1"):
        mg.metagradient(metric, step, own, batches, meta)
    with pytest.raises(ValueError, match="`meta` differ between rank 0 and rank 1"):
        mg.metagradient(metric, step, params, batches, {"weights": meta["weights"] + ranks.rank})
    fewer = [batches[t] for t in range(1 if ranks.rank == 1 else 2)]
    with pytest.raises(ValueError, match="batches. Give each its part"):
        mg.metagradient(metric, step, params, fewer, meta)


@pytest.mark.parametrize("name", ["metrics", "states", "wrt_params", "schedule", "resume"])
def test_settings_that_differ_are_refused(ranks, name, tmp_path):
    metric, *others = over(ranks, PROBLEMS["mlp"](2).arguments(OPTIMIZERS["sgd"]))
    first = ranks.rank == 0
    options = {
        "metrics": {},
        "states": {},
        "wrt_params": {"wrt_params": first},
        "schedule": {"schedule": mg.Binomial(1 if first else 2)},
        "resume": {"resume": tmp_path if first else None},
    }[name]
    with pytest.raises(ValueError, match="on rank 0 and .* on rank 1. Pass the same"):
        given = {"metrics": [metric] * (1 + first), "states": mg.Trajectory({1 + first: metric})}.get(name, metric)
        mg.metagradient(given, *others, **options)


def test_a_metric_of_ones_own_is_refused(ranks):
    metric, *others = over(ranks, PROBLEMS["mlp"](2).arguments(OPTIMIZERS["sgd"]))
    with pytest.raises(ValueError, match="metric 0 is .* on rank 0 and .* on rank 1. Every rank evaluates the whole"):
        mg.metagradient(lambda state: (1 + ranks.rank) * metric(state), *others)


def test_a_learning_rate_of_ones_own_is_refused(ranks):
    arguments = over(ranks, PROBLEMS["mlp"](2).arguments(mg.optim.sgd(lr=0.1 * (1 + ranks.rank))))
    with pytest.raises(ValueError, match="the norm of trained parameter 'a' is .* the same learning rate"):
        mg.metagradient(*arguments)


def test_states_of_two_ranks_in_one_folder_are_refused(ranks):
    folder = ranks.first(tempfile.mkdtemp(), "a folder")
    arguments = over(ranks, PROBLEMS["mlp"](2).arguments(OPTIMIZERS["sgd"]))
    with pytest.raises(ValueError, match="several ranks keep their states in"):
        mg.metagradient(*arguments, store=mg.DiskStore(folder))


def test_an_infinite_loss_of_one_rank_is_named_on_all(ranks):
    """Its gradient is finite, so that the sum of gradients does not tell."""

    def loss(params, batch):
        return (batch["x"] * params["w"]).square().sum(1) + batch["far"]

    x, far = torch.ones(4, 2), torch.tensor([0.0, 0.0, 0.0, torch.inf])
    batches = ranks.part([{"x": x, "far": far, "index": torch.arange(4)}])
    step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(lr=0.1), ranks=ranks)
    with pytest.raises(mg.NonFiniteError, match="not finite at step 0"):
        mg.metagradient(
            lambda state: state.params["w"].sum(), step, {"w": torch.ones(2)}, batches, {"weights": torch.ones(4)}
        )


def test_counts_that_differ_are_refused(ranks):
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("seen", torch.tensor(0))

        def forward(self, x):
            self.seen += 1 + ranks.rank
            return (x * self.weight).square().sum(1)

    model = Counting()
    step = mg.TrainStep(
        mg.weighted(lambda params, batch: torch.func.functional_call(model, params, (batch["x"],))),
        mg.optim.sgd(lr=0.1),
        ranks=ranks,
    )
    batches = ranks.part([{"x": torch.ones(4, 2), "index": torch.arange(4)}])
    with pytest.raises(ValueError, match="the buffers after step 0 differ"):
        mg.metagradient(lambda state: state.params["weight"].sum(), step, model, batches, {"weights": torch.ones(4)})


def test_a_scalar_loss_is_refused(ranks):
    step = mg.TrainStep(
        lambda params, batch, meta: (batch["x"] * params["w"]).mean(), mg.optim.sgd(lr=0.1), ranks=ranks
    )
    with pytest.raises(ValueError, match="or several ranks ask for"):
        mg.metagradient(
            lambda state: state.params["w"].sum(), step, {"w": torch.ones(2)}, ranks.part([{"x": torch.ones(4, 2)}]), {}
        )


def test_one_ranks_error_reaches_all(ranks):
    metric, step, params, batches, meta = over(ranks, PROBLEMS["mlp"](2).arguments(OPTIMIZERS["sgd"]))
    own = [{**batches[0], "index": batches[0]["index"] + (100 if ranks.rank == 1 else 0)}, batches[1]]
    kind, message = (ValueError, "refers to example") if ranks.rank == 1 else (mg.distributed.RankError, "rank 1")
    with pytest.raises(kind, match=message):
        mg.metagradient(metric, step, params, own, meta)
    broken = [{**batches[0], "x": batches[0]["x"] * (torch.inf if ranks.rank == 1 else 1)}, batches[1]]
    with pytest.raises(mg.NonFiniteError, match="step 0"):
        mg.metagradient(metric, step, params, broken, meta)


def test_statistics_of_one_ranks_examples_are_refused(ranks):
    with pytest.raises(ValueError, match="buffer 'norm.running_mean' by the examples"):
        mg.metagradient(*over(ranks, PROBLEMS["cnn"](2).arguments(OPTIMIZERS["sgd"])))


def test_a_step_over_ranks_keeps_no_graph(ranks):
    _, step, params, batches, meta = over(ranks, PROBLEMS["mlp"](1).arguments(OPTIMIZERS["sgd"]))
    with pytest.raises(ValueError, match="of several ranks keeps no graph"):
        step(step.init(params, meta), batches[0], meta)


def test_a_batch_that_cannot_be_divided_is_refused(ranks):
    parts = ranks.part([{"x": torch.zeros(ranks.num_ranks - 1, 2)}])
    with pytest.raises(ValueError, match=f"cannot be divided among {ranks.num_ranks} ranks"):
        parts[0]
