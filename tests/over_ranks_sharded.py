"""The tests of a run whose state is divided among processes; every one of them runs these.

    torchrun --nproc-per-node 2 -m pytest tests/over_ranks_sharded.py

`tests/test_ranks_are_one_process.py` does that, also with 4.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from agreement import assert_agree, assert_same_bits, relative_error
from optimizers import BUILDERS, SMOOTH
from over_ranks import OPTIONS, PLAIN, ranks  # noqa: F401  # a fixture
from test_hyperparameters_have_gradients import NUM_STEPS, TABLE, constants
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import metagrad as mg

OPTIMIZERS = {n: b() for n, b in BUILDERS.items() if n != "muon" and not n.startswith("torchopt")}
ELEMENTWISE = [row for row in TABLE if row[0].__name__ not in ("muon", "foreign")]


def sharded(ranks, arguments):  # noqa: F811  # the fixture
    """The arguments of a metagradient, for this rank."""
    metric, step, params, batches, meta = arguments
    step = mg.distributed.Sharded(replace(step, ranks=ranks))
    return metric, step, params, ranks.part(batches), meta


def whole(tree):
    """`tree` with tensors that are distributed put together."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tree.items()}


def together(result: mg.Result) -> mg.Result:
    """`result` as one process has it."""
    state = result.state._replace(params=whole(result.state.params))
    return result._replace(state=state, params=result.params and whole(result.params))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_those_of_one_process(ranks, name, optimizer, options):  # noqa: F811
    arguments = PLAIN[name](4).arguments(OPTIMIZERS[optimizer], **options)
    found = together(mg.metagradient(*sharded(ranks, arguments), wrt_params=True))
    assert_agree(found, mg.metagradient(*arguments, wrt_params=True), rtol=1e-12)
    if optimizer in ("adamw", "clipped"):
        assert_agree(found, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 1, "clip_norm": 0.3}], ids=str)
@pytest.mark.parametrize("make, values", ELEMENTWISE, ids=[make.__name__ for make, _ in ELEMENTWISE])
def test_hyperparameters_have_their_gradients(ranks, make, values, options):  # noqa: F811
    problem = PLAIN["mlp"](NUM_STEPS)
    meta = {**{name: torch.tensor(value) for name, value in values.items()}, **problem.meta}
    loss = mg.weighted(problem.loss)
    step = mg.TrainStep(loss, lambda meta: make({**constants(values), **meta}), **options)
    arguments = problem.metric, step, problem.params, problem.batches, meta
    found = together(mg.metagradient(*sharded(ranks, arguments), wrt_params=True))
    assert_agree(found, mg.metagradient(*arguments, wrt_params=True), rtol=1e-12)
    assert_agree(found, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)


SCHEDULES = [mg.Binomial(1), mg.Binomial(2), mg.Binomial(3), mg.Tree(2), mg.Hierarchical(1, 2)]


@pytest.mark.parametrize("options", [{"clip_norm": 0.1}, {"microbatch_size": 1}], ids=str)
def test_schedules_and_stores_change_no_bit(ranks, tmp_path, options):  # noqa: F811
    arguments = sharded(ranks, PLAIN["shared"](6).arguments(OPTIMIZERS["adamw"], **options))
    expected = together(mg.metagradient(*arguments, schedule=mg.EveryStep(), wrt_params=True))
    for number, schedule in enumerate(SCHEDULES):
        store = mg.DiskStore(tmp_path / f"{number}") if isinstance(schedule, mg.Hierarchical) else None
        found = mg.metagradient(*arguments, schedule=schedule, store=store, wrt_params=True)
        assert_same_bits(together(found), expected)
    store = mg.DiskStore(tmp_path / "all")
    found = mg.metagradient(*arguments, schedule=mg.EveryStep(), store=store, wrt_params=True)
    assert_same_bits(together(found), expected)


@pytest.mark.parametrize("budget", [mg.Budget(ram=60_000), mg.Budget(ram=60_000, disk=1_000_000)], ids=str)
def test_a_budget_gives_every_rank_the_same_schedule(ranks, tmp_path, budget):  # noqa: F811
    arguments = sharded(ranks, PLAIN["shared"](6).arguments(OPTIMIZERS["adamw"]))
    expected = together(mg.metagradient(*arguments, schedule=mg.EveryStep()))
    store = mg.DiskStore(tmp_path / "states") if budget.disk else None
    assert_same_bits(together(mg.metagradient(*arguments, schedule=budget, store=store)), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_one_step_needs_no_hessian(ranks, name):  # noqa: F811
    arguments = PLAIN[name](1).arguments(OPTIMIZERS["adam"])
    assert_agree(mg.metagradient(*sharded(ranks, arguments)), mg.metagradient(*arguments), rtol=1e-12)


def test_several_metrics_share_one_replay(ranks):  # noqa: F811
    metric, *rest = PLAIN["mlp"](4).arguments(OPTIMIZERS["adamw"], clip_norm=0.1)
    norm = mg.Trajectory({t: lambda state: state.params["b"].square().sum() for t in (0, 2, 4)})
    arguments = [metric, norm, lambda state: state.params["c"].sum()], *rest
    found = mg.metagradient(*sharded(ranks, arguments), wrt_params=True)
    assert found.params["a"].placements == (Shard(1),)
    assert_agree(together(found), mg.metagradient(*arguments, wrt_params=True), rtol=1e-12)


@pytest.mark.parametrize("curvature", ["forward-over-reverse", "reverse-over-forward", "auto"])
def test_every_order_of_modes(ranks, curvature):  # noqa: F811
    arguments = PLAIN["mlp"](3).arguments(OPTIMIZERS["adamw"], curvature=curvature)
    found = together(mg.metagradient(*sharded(ranks, arguments), wrt_params=True))
    assert_agree(found, mg.check.unrolled(*PLAIN["mlp"](3).arguments(OPTIMIZERS["adamw"]), wrt_params=True), rtol=1e-9)


def odd_shapes(state):
    """A metric of the problem below."""
    return state.params["scale"] * state.params["short"].square().sum() + state.params["bias"].cos().sum()


@pytest.fixture
def odd():
    """A number, one row, no row at all, and as many rows as fit no number of ranks."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"scale": (), "short": (1, 3), "none": (0, 2), "bias": (5,), "cube": (3, 2, 2)}
    params = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    def loss(p, batch):
        hidden = torch.tanh(p["scale"] * batch["x"] @ p["short"].mT) + p["bias"]
        return (hidden @ p["bias"].outer(p["cube"].flatten())).square().sum(1) + p["none"].sum()

    x = torch.randn(6, 3, generator=draw)
    batches = [{"x": x, "index": torch.arange(6)}] * 3
    lr = torch.tensor(0.02)
    step = mg.TrainStep(mg.weighted(loss), lambda meta: mg.optim.adamw(meta["lr"], weight_decay=0.1, **SMOOTH))
    return odd_shapes, step, params, batches, {"weights": torch.rand(6, generator=draw), "lr": lr}


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.01}], ids=str)
def test_numbers_and_parameters_with_fewer_rows_than_ranks(ranks, odd, options, tmp_path):  # noqa: F811
    metric, step, *rest = odd
    arguments = metric, replace(step, **options), *rest
    found = mg.metagradient(*sharded(ranks, arguments), wrt_params=True, store=mg.DiskStore(tmp_path / "states"))
    assert found.params["scale"].placements == (Replicate(),)
    assert_agree(together(found), mg.metagradient(*arguments, wrt_params=True), rtol=1e-12)
    assert_agree(together(found), mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)


def test_groups_are_made_of_whole_parameters(ranks):  # noqa: F811
    def rule(name: str, tensor: Tensor) -> str:
        return "small" if tensor.numel() <= 8 else "large"  # The rows of a large one may be small.

    optimizer = mg.optim.groups(rule, {"small": mg.optim.sgd(0.3), "large": OPTIMIZERS["clipped"]})
    arguments = PLAIN["mlp"](4).arguments(optimizer)
    found = together(mg.metagradient(*sharded(ranks, arguments), wrt_params=True))
    assert_agree(found, mg.metagradient(*arguments, wrt_params=True), rtol=1e-12)


def test_a_result_is_divided_and_can_be_continued(ranks):  # noqa: F811
    arguments = PLAIN["mlp"](4).arguments(OPTIMIZERS["adamw"])
    metric, step, params, batches, meta = sharded(ranks, arguments)
    first = mg.metagradient(metric, step, params, batches, meta)
    assert all(isinstance(tensor, DTensor) for tensor in first.state.params.values())
    assert sum(t.to_local().numel() for t in first.state.params.values()) < sum(t.numel() for t in params.values())
    mean = first.state.optimizer.mean["a"]
    assert mean.shape == params["a"].shape and mean.placements == (Shard(0),)
    second = mg.metagradient(metric, step, first.state, batches, meta, wrt_params=True)
    alone = mg.metagradient(*arguments)
    expected = mg.metagradient(metric, arguments[1], alone.state, arguments[3], meta, wrt_params=True)
    assert_agree(together(second), expected, rtol=1e-12)
    for name, gradient in whole(second.optimizer.square).items():
        assert relative_error(gradient, expected.optimizer.square[name]) <= 1e-12
    # The same from whole tensors, which every rank cuts.
    assert_agree(together(mg.metagradient(metric, step, alone.state, batches, meta, wrt_params=True)), expected, 1e-12)


def test_parameters_of_fsdp_are_taken_as_they_are(ranks):  # noqa: F811
    from torch.distributed.fsdp import fully_shard

    problem = PLAIN["shared"](4)
    arguments = problem.arguments(OPTIMIZERS["adamw"])
    model = fully_shard(deepcopy(problem.params), mesh=init_device_mesh("cpu", (ranks.num_ranks,)))
    params = dict(model.named_parameters())
    assert all(isinstance(tensor, DTensor) for tensor in params.values())
    metric, step, _, batches, meta = sharded(ranks, arguments)
    expected = mg.metagradient(*arguments, wrt_params=True)
    for given in (params, model):
        found = mg.metagradient(metric, step, given, batches, meta, wrt_params=True)
        assert_agree(together(found), expected, rtol=1e-12)
    # Divided in another way they are put together first.
    other = {name: tensor.redistribute(placements=[Replicate()]) for name, tensor in params.items()}
    found = mg.metagradient(metric, step, other, batches, meta, wrt_params=True)
    assert_agree(together(found), expected, rtol=1e-12)


def test_a_checkpoint_of_torch_holds_the_result(ranks, tmp_path_factory):  # noqa: F811
    from torch.distributed import checkpoint

    folder = ranks.first(str(tmp_path_factory.mktemp("checkpoint")), "the folder")
    state = mg.metagradient(*sharded(ranks, PLAIN["mlp"](2).arguments(OPTIMIZERS["sgd"]))).state
    checkpoint.save({"params": state.params}, checkpoint_id=folder)
    read = {name: torch.zeros(tensor.shape) for name, tensor in state.params.items()}
    checkpoint.load({"params": read}, checkpoint_id=folder)
    for name, tensor in whole(state.params).items():
        assert torch.equal(read[name], tensor)


def test_the_share_of_a_rank_falls_with_their_number(ranks):  # noqa: F811
    draw = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(64, 64, generator=draw)}
    batch = {"x": torch.randn(8, 64, generator=draw), "index": torch.arange(8)}
    step = mg.TrainStep(mg.weighted(lambda p, b: (b["x"] @ p["w"]).square().sum(1)), OPTIMIZERS["adam"])
    arguments = lambda state: state.params["w"].sum(), step, params, [batch] * 4, {"weights": torch.ones(8)}
    result = mg.metagradient(*sharded(ranks, arguments), schedule=mg.EveryStep())
    # Four states of parameters and two moments, and gradients with all but the last; counts and random states apart.
    entries = 64 * 64 // ranks.num_ranks * 8
    assert result.stats.ram_bytes <= entries * (4 * 3 + 4) + 4 * 12_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of compilers
def test_compiled(ranks):  # noqa: F811
    arguments = PLAIN["mlp"](3).arguments(OPTIMIZERS["adamw"], compile=True)
    found = mg.metagradient(*sharded(ranks, arguments), wrt_params=True)
    assert found.stats.curvature == "compiled"
    expected = mg.check.unrolled(*PLAIN["mlp"](3).arguments(OPTIMIZERS["adamw"]), wrt_params=True)
    assert_agree(together(found), expected, rtol=1e-9)


def test_optimizers_that_see_whole_parameters_are_refused(ranks):  # noqa: F811
    with_muon = mg.optim.groups(lambda name, tensor: name, {"a": OPTIMIZERS["adam"], "b": BUILDERS["muon"]()})
    own = mg.optim.GradientTransformation(lambda params: (), lambda g, s, *, params=None, inplace=False: (g, s))
    for optimizer in (BUILDERS["muon"](), BUILDERS["torchopt adam"](), with_muon, own, lambda meta: own):
        arguments = sharded(ranks, PLAIN["mlp"](2).arguments(optimizer))
        with pytest.raises(ValueError, match="the optimizer cannot be sharded"):
            mg.metagradient(*arguments)
    clipped = PLAIN["mlp"](2).arguments(BUILDERS["muon"](), clip_norm=1.0)
    with pytest.raises(ValueError, match="the optimizer cannot be sharded"):
        mg.metagradient(*sharded(ranks, clipped))


def test_what_needs_a_whole_state_is_refused(ranks):  # noqa: F811
    metric, step, params, batches, meta = arguments = sharded(ranks, PLAIN["mlp"](2).arguments(OPTIMIZERS["adam"]))
    with pytest.raises(ValueError, match="the metric reads `state.optimizer`"):
        mg.metagradient(lambda state: state.optimizer.mean["a"].sum(), *arguments[1:])
    with pytest.raises(ValueError, match="the metric reads `state.optimizer`"):
        mg.metagradient(lambda state: state.optimizer[1]["a"].sum(), *arguments[1:])
    with pytest.raises(ValueError, match="Pass the step without `Sharded`"):
        mg.train(step, params, batches, meta)
    for check in (mg.check.unrolled, mg.check.finite_differences):
        with pytest.raises(ValueError, match="a sharded step is run by mg.metagradient alone"):
            check(*arguments)
    with pytest.raises(ValueError, match="a sharded step is run by mg.metagradient alone"):
        mg.check.determinism(*arguments[1:])
    with pytest.raises(ValueError, match="without `ranks`"):
        mg.distributed.Sharded(replace(step.step, ranks=None))
    with pytest.raises(ValueError, match="`num_graphs` is 2"):
        mg.metagradient(*arguments, schedule=mg.EveryStep(num_graphs=2))
    with pytest.raises(ValueError, match="part of the optimizer state"):
        state = mg.metagradient(metric, step, params, batches, meta).state
        mg.metagradient(metric, step, state._replace(optimizer=()), batches, meta)


def test_initial_parameters_that_differ_are_refused(ranks):  # noqa: F811
    metric, step, params, batches, meta = sharded(ranks, PLAIN["mlp"](2).arguments(OPTIMIZERS["sgd"]))
    own = {**params, "a": params["a"] + ranks.rank}
    with pytest.raises(ValueError, match="the initial parameters.*differ between rank 0 and rank 1"):
        mg.metagradient(metric, step, own, batches, meta)


@pytest.fixture
def with_a_zero(ranks):  # noqa: F811
    """A loss of w in which only the last rank's rows meet a 0."""
    start = torch.ones(4)
    start[-1] = 0.0
    batches = [{"x": torch.ones(ranks.num_ranks), "index": torch.arange(ranks.num_ranks)}] * 2
    meta = {"weights": torch.ones(ranks.num_ranks)}

    def arguments(power):
        step = mg.TrainStep(mg.weighted(lambda p, b: b["x"] * (p["w"].abs() ** power).sum()), mg.optim.sgd(0.1))
        return lambda state: state.params["w"].sum(), step, {"w": start}, batches, meta

    return arguments


def test_what_is_not_finite_on_one_rank_is_reported_by_all(ranks, with_a_zero):  # noqa: F811
    """The square root has no gradient at 0, and the power 1.5 no second derivative."""
    with pytest.raises(mg.NonFiniteError, match=r"gradient is not finite at step 0 in params\['w'\]"):
        mg.metagradient(*sharded(ranks, root := with_a_zero(0.5)))
    with pytest.raises(mg.NonFiniteError, match=r"cotangent is not finite at step 1 in state.params\['w'\]"):
        mg.metagradient(*sharded(ranks, with_a_zero(1.5)))
    metric = lambda state: state.params["w"].sqrt().sum()  # noqa: E731
    with pytest.raises(mg.NonFiniteError, match=r"gradient of the metric is not finite in state.params\['w'\]"):
        mg.metagradient(*sharded(ranks, (metric, with_a_zero(2)[1], *root[2:])))
    metric, step, params, batches, meta = sharded(ranks, with_a_zero(2))
    broken = [{**batches[0], "x": batches[0]["x"] * (torch.inf if ranks.rank == 1 else 1)}, batches[1]]
    with pytest.raises(mg.NonFiniteError, match="step 0"):
        mg.metagradient(metric, step, params, broken, meta)
