"""The tests of a run whose state is divided among processes; every one of them runs these.

    torchrun --nproc-per-node 2 -m pytest tests/over_ranks_sharded.py

`tests/test_ranks_are_one_process.py` does that, also with 4.
"""

from dataclasses import replace

import pytest
import torch
from agreement import assert_agree, assert_same_bits, relative_error
from optimizers import BUILDERS, SMOOTH, by_shape
from over_ranks import OPTIONS, PLAIN, ranks  # noqa: F401  # a fixture
from test_hyperparameters_have_gradients import NUM_STEPS, TABLE, constants
from torch import Tensor
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
@pytest.mark.parametrize(
    "make, values", ELEMENTWISE, ids=[make.__name__ for make, _ in ELEMENTWISE]
)
def test_hyperparameters_have_their_gradients(ranks, make, values, options):  # noqa: F811
    problem = PLAIN["mlp"](NUM_STEPS)
    meta = {**{name: torch.tensor(value) for name, value in values.items()}, **problem.meta}
    loss = mg.weighted(problem.loss)
    step = mg.TrainStep(loss, lambda meta: make({**constants(values), **meta}), **options)
    arguments = problem.metric, step, problem.params, problem.batches, meta
    found = together(mg.metagradient(*sharded(ranks, arguments), wrt_params=True))
    assert_agree(found, mg.metagradient(*arguments, wrt_params=True), rtol=1e-12)
    assert_agree(found, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-9)
