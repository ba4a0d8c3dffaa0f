"""The tests of a run over several processes; every one of them runs these.

    torchrun --nproc-per-node 2 -m pytest tests/over_ranks.py

`tests/test_ranks_are_one_process.py` does that.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from agreement import assert_agree, assert_same_bits
from optimizers import OPTIMIZERS
from problems import ODD_PROBLEMS, PROBLEMS
from torch import nn
from torch.func import functional_call

import metagrad as mg

# Those whose losses draw no random numbers and keep no statistics: every rank does its part of what one process does.
PLAIN = {name: build for name, build in {**PROBLEMS, **ODD_PROBLEMS}.items() if name not in ("cnn", "gpt2")}
OPTIONS = [{}, {"microbatch_size": 1}, {"clip_norm": 0.1}, {"reverse_microbatch_size": 1}]


@pytest.fixture(scope="session")
def ranks():
    return mg.distributed.start(timeout=60)


def over(ranks, arguments):
    """The arguments of a metagradient, for this rank."""
    metric, step, params, batches, meta = arguments
    return metric, replace(step, ranks=ranks), params, ranks.part(batches), meta


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_those_of_one_process(ranks, name, optimizer, options):
    arguments = PLAIN[name](4).arguments(OPTIMIZERS[optimizer], **options)
    alone = mg.metagradient(*arguments, wrt_params=True)
    assert_agree(mg.metagradient(*over(ranks, arguments), wrt_params=True), alone, rtol=1e-12)
    exact = mg.check.unrolled(*arguments, wrt_params=True)
    assert_agree(mg.metagradient(*over(ranks, arguments), wrt_params=True), exact, rtol=1e-9)
