"""Groups: each parameter is updated by the transformation of its label, and by nothing else."""

import pytest
import torch
import torchopt
from agreement import assert_same_bits
from problems import PROBLEMS
from torch.nn.utils import clip_grad_norm_

import metagrad as mg


def test_one_group_of_all_is_no_group():
    problem = PROBLEMS["mlp"](4)
    adam = mg.optim.adam(0.05, weight_decay=0.1)
    alone, grouped = (
        mg.metagradient(*problem.arguments(optimizer), wrt_params=True)
        for optimizer in (adam, mg.optim.groups(lambda name, tensor: "all", {"all": adam, "none": mg.optim.clip(1.0)}))
    )
    assert_same_bits(grouped, alone)


def test_groups_that_are_equal_are_no_groups():
    problem = PROBLEMS["mlp"](4)
    transformations = {name: mg.optim.sgd(0.05, 0.9, 0.1, weight_decay=0.2) for name in problem.params}
    alone, grouped = (
        mg.metagradient(*problem.arguments(optimizer), wrt_params=True)
        for optimizer in (transformations["a"], mg.optim.groups(lambda name, tensor: name, transformations))
    )
    assert_same_bits(grouped, alone)


def test_a_norm_is_that_of_its_group():
    gradient = {name: torch.arange(1.0, 4.0) * size for name, size in [("a", 1.0), ("b", 5.0), ("c", 7.0)]}
    clipped = mg.optim.groups(
        lambda name, tensor: "ab" if name in "ab" else "c", {"ab": mg.optim.clip(0.5), "c": mg.optim.clip(1.0)}
    )
    ours, _ = clipped.update(gradient, clipped.init(gradient), params=gradient, inplace=False)
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in gradient.items()}
    for name, value in theirs.items():
        value.grad = gradient[name].clone()
    clip_grad_norm_([theirs["a"], theirs["b"]], 0.5)
    clip_grad_norm_([theirs["c"]], 1.0)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.grad, rtol=1e-14, atol=0)


def test_a_frozen_group_stays_where_it_is():
    problem = PROBLEMS["mlp"](3)
    transformations = {"train": mg.optim.adam(0.05), "freeze": mg.optim.sgd(0.0)}
    rule = {"a": "freeze", "b": "train", "c": "train"}
    step = problem.step(mg.optim.groups(lambda name, tensor: rule[name], transformations))
    trained = mg.train(step, problem.params, problem.batches, problem.meta).params
    assert torch.equal(trained["a"], problem.params["a"])
    assert not torch.equal(trained["b"], problem.params["b"])


def test_a_transformation_of_torchopt_proves_itself_inside_a_group():
    with pytest.raises(ValueError, match="not pure"):
        mg.optim.groups(lambda name, tensor: "a", {"a": torchopt.sgd(0.1, momentum=0.9)}).init({"w": torch.ones(3)})
