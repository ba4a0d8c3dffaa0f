"""On a GPU: rewards are those of the CPU, and a run that is stopped and continued has the bits of one that was not.

Skipped where torch finds no CUDA device; `nox -s gpu` runs them there.
"""

from dataclasses import replace

import pytest
import torch
from dpg_problems import ADAMW, TEXTS, generator, same_bits, target

import metagrad as mg
from dpg.grpo import GrpoConfig
from dpg.loop import train
from dpg.metrics import HeldOutLoss
from dpg.reward import MetagradReward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CONFIG = GrpoConfig(num_steps=3, prompts_per_step=2, group_size=4, learning_rate=1e-2)


def on_gpu(part):
    """A target or a generator, its model on the GPU."""
    return replace(part, model=part.model.cuda())


def reward(move=lambda part: part):
    return MetagradReward(move(target(mg.optim.adamw(**ADAMW))), HeldOutLoss(["abc", "hij"]))


def test_rewards_are_those_of_the_cpu():
    torch.testing.assert_close(reward(on_gpu)(TEXTS).cpu(), reward()(TEXTS), rtol=1e-9, atol=0)


def test_a_run_goes_on_with_the_same_bits():
    def run(**options):
        writer = on_gpu(generator())
        train(writer, ["a", "bc", "d", "ef"], reward(on_gpu), options.pop("config", CONFIG), **options)
        return {name: value.clone() for name, value in writer.model.state_dict().items()}

    kept = []
    uncut = run(on_step=lambda record, checkpoint: kept.append(checkpoint()))
    again = run(on_step=lambda record, checkpoint: None)
    assert same_bits(uncut, again)
    for checkpoint in kept[:2]:
        assert same_bits(run(resume=checkpoint), uncut)


def test_samples_do_not_depend_on_the_callers_random_numbers():
    def texts():
        written = []

        def keep(record, checkpoint):
            written.append(record.num_tokens)

        train(on_gpu(generator()), ["a", "bc"], reward(on_gpu), CONFIG, seed=3, on_step=keep)
        return written

    torch.cuda.manual_seed(1)
    first = texts()
    before = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(2)
    assert texts() == first
    torch.cuda.set_rng_state(before)
