"""Contract 1 for everything together: metaparameters, optimizers, schedules, stores, micro-batches, metrics.

Each example is a run with a random mixture, compared with plain autograd through all its steps and with differences.
"""

from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torchopt
from agreement import relative_error
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from optimizers import by_shape
from torch import Tensor

import metagrad as mg

NUM_STEPS, NUM_EXAMPLES = 5, 7
HISTORY = 2  # steps of an earlier run


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS, LABELS = drawn(NUM_EXAMPLES, 3, seed=1), drawn(NUM_EXAMPLES, 2, seed=2)
HELD_OUT = drawn(5, 3, seed=3), drawn(5, 2, seed=4)
PARAMS = {"a": 0.5 * drawn(3, 4, seed=5), "b": 0.1 * drawn(4, seed=6), "c": 0.5 * drawn(4, 2, seed=7)}
BATCHES = [{"index": (torch.arange(4) + 3 * t) % NUM_EXAMPLES} for t in range(NUM_STEPS)]

# Whatever is not drawn stands as a constant of the loss or of the optimizer.
OF_THE_LOSS = {
    "weights": 1 + 0.3 * drawn(NUM_EXAMPLES, seed=8),
    "token_weights": 1 + 0.3 * drawn(NUM_EXAMPLES, 2, seed=9),
    "inputs": INPUTS,
    "labels": LABELS,
    "smoothing": torch.tensor(0.1),
    "mixing": torch.tensor(0.2),
}
OF_THE_OPTIMIZER = {
    "lr": torch.tensor(0.05),
    "lr_of_step": 0.05 + 0.01 * drawn(HISTORY + NUM_STEPS, seed=10),
    "momentum": torch.tensor(0.7),
    "dampening": torch.tensor(0.2),
    "decay": torch.tensor(0.1),
    "beta1": torch.tensor(0.8),
    "beta2": torch.tensor(0.95),
    "eps": torch.tensor(1e-3),
    "eps_root": torch.tensor(1e-2),
    "clip": torch.tensor(0.4),
}
ALL = {**OF_THE_LOSS, **OF_THE_OPTIMIZER}


def predicted(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["a"] + params["b"]) @ params["c"]


def loss(params: dict[str, Tensor], batch: dict[str, Tensor], meta: dict[str, Tensor]) -> Tensor:
    """Reads every metaparameter of `OF_THE_LOSS`, the drawn ones from `meta`."""
    given, index = {**OF_THE_LOSS, **meta}, batch["index"]
    labels = (1 - given["smoothing"]) * given["labels"][index] + given["smoothing"] * LABELS.mean()
    errors = predicted(params, given["inputs"][index]) - labels
    by_token = (1 - given["mixing"]) * errors.square() + given["mixing"] * torch.log(torch.cosh(errors))
    return given["weights"][index] * (given["token_weights"][index] * by_token).sum(1)


def optimizer_of(kind: str) -> Any:
    """From `meta` to an optimizer that reads every hyperparameter it has, the drawn ones from `meta`."""

    def build(meta: dict[str, Tensor]):
        values = {**OF_THE_OPTIMIZER, **meta}
        lr = (lambda step: values["lr_of_step"][step]) if "lr_of_step" in meta else values["lr"]
        sgd = mg.optim.sgd(lr, values["momentum"], values["dampening"], weight_decay=values["decay"])
        adam = {
            "lr": lr,
            "betas": (values["beta1"], values["beta2"]),
            "eps": values["eps"],
            "eps_root": values["eps_root"],
            "weight_decay": values["decay"],
        }
        match kind:
            case "sgd":
                chosen = sgd
            case "nesterov":
                chosen = mg.optim.sgd(lr, values["momentum"], values["dampening"], True, values["decay"])
            case "adam":
                chosen = mg.optim.adam(**adam)
            case "adamw":
                chosen = mg.optim.adamw(**adam)
            case "muon":
                others = mg.optim.adamw(**adam)
                chosen = mg.optim.muon(lr, values["momentum"], weight_decay=values["decay"], others=others)
            case "groups":
                chosen = mg.optim.groups(by_shape, {"matrix": sgd, "vector": mg.optim.adamw(**adam)})
        return torchopt.chain(mg.optim.clip(values["clip"]), chosen) if "clip" in meta else chosen

    return build


OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw", "muon", "groups"]
SCHEDULES = [
    mg.EveryStep(),
    mg.Binomial(1),
    mg.Binomial(3),
    mg.Tree(2),
    mg.Tree(3),
    mg.Hierarchical(1, 2),
    mg.Budget(ram=40_000),
]


def held_out(state: mg.State) -> Tensor:
    return (predicted(state.params, HELD_OUT[0]) - HELD_OUT[1]).square().sum(1).mean()


def size(state: mg.State) -> Tensor:
    return sum(p.square().sum() for p in state.params.values())


METRICS = {
    "one": held_out,
    "three": [held_out, size, lambda state: state.params["b"][0] ** 3],
    "trajectory": mg.Trajectory({t: held_out for t in range(1, NUM_STEPS + 1)}),
    "both": [mg.Trajectory({0: size, 2: held_out, NUM_STEPS: size}), held_out],
}


def all_gradients(result: mg.Result) -> dict[str, Tensor]:
    """Every gradient of a result by name, those of the initial optimizer state too."""
    optimizer = {} if result.optimizer is None else dict(enumerate(torch.utils._pytree.tree_leaves(result.optimizer)))
    memory = {f"optimizer {k}": leaf for k, leaf in optimizer.items() if isinstance(leaf, Tensor)}
    return {"value": result.value, **result.meta, **(result.params or {}), **memory}


def started(step: mg.TrainStep, meta: dict[str, Tensor]) -> mg.State:
    """A state with a history, so that its optimizer remembers something."""
    return mg.train(step, PARAMS, BATCHES[:HISTORY], meta)


def check(names, kind, schedule, store, microbatch_size, metric, with_history, wrt_params) -> None:
    meta = {name: ALL[name] for name in sorted(names)}
    step = mg.TrainStep(loss, optimizer_of(kind), microbatch_size=microbatch_size)
    start = started(step, meta) if with_history else PARAMS
    arguments = METRICS[metric], step, start, BATCHES, meta
    exact = all_gradients(mg.check.unrolled(*arguments, wrt_params=wrt_params))
    with TemporaryDirectory() as folder:
        options = {"store": mg.DiskStore(folder)} if store == "disk" else {}
        if store == "folder":
            options = {"resume": folder}
        if isinstance(schedule, mg.Hierarchical) and not options:
            options = {"store": mg.DiskStore(folder)}
        result = mg.metagradient(*arguments, schedule=schedule, wrt_params=wrt_params, **options)
    found = all_gradients(result)
    assert found.keys() == exact.keys()
    errors = {name: relative_error(found[name], wanted) for name, wanted in exact.items()}
    assert max(errors.values()) <= 1e-9, errors
    if metric == "one":
        # Muon turns a small matrix by a large angle, so its differences need smaller steps.
        size = 1e-3 if kind == "muon" else 1e-2
        differences = mg.check.finite_differences(
            *arguments, wrt_params=wrt_params, num_directions=1, num_levels=5, step_size=size
        )
        assert differences.relative_error(result).max() <= 1e-6


@settings(max_examples=150, phases=[Phase.explicit, Phase.generate])
@given(
    names=st.sets(st.sampled_from(sorted(ALL)), min_size=1),
    kind=st.sampled_from(OPTIMIZERS),
    schedule=st.sampled_from(SCHEDULES),
    store=st.sampled_from(["ram", "ram", "disk", "folder"]),
    microbatch_size=st.sampled_from([None, 1, 3]),
    metric=st.sampled_from(sorted(METRICS)),
    with_history=st.booleans(),
    wrt_params=st.booleans(),
)
@example(set(ALL) - {"lr"}, "nesterov", mg.Tree(2), "ram", None, "one", True, True)
@example(set(ALL) - {"lr_of_step"}, "adamw", mg.Binomial(1), "folder", 3, "both", True, True)
@example(set(ALL), "muon", mg.Hierarchical(1, 2), "disk", 1, "three", False, False)
@example({"weights"}, "adam", mg.EveryStep(), "ram", 1, "one", False, False)
def test_any_mixture_is_exact(names, kind, schedule, store, microbatch_size, metric, with_history, wrt_params):
    check(names, kind, schedule, store, microbatch_size, metric, with_history, wrt_params)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", sorted(ALL))
def test_each_metaparameter_alone(name, kind):
    check({name}, kind, mg.Binomial(2), "ram", None, "one", False, True)


def test_weights_of_tokens_are_those_of_a_loss_written_out():
    """`mg.weighted` with weights of two axes is the weighted sum over tokens."""

    def by_token(params, batch):
        return (predicted(params, INPUTS[batch["index"]]) - LABELS[batch["index"]]).square()

    weights = {"weights": OF_THE_LOSS["token_weights"]}
    optimizer = mg.optim.adam(0.05, eps_root=1e-2)
    arguments = held_out, mg.TrainStep(mg.weighted(by_token), optimizer), PARAMS, BATCHES, weights
    result = mg.metagradient(*arguments)
    assert relative_error(result.meta["weights"], mg.check.unrolled(*arguments).meta["weights"]) <= 1e-12

    def written_out(params, batch, meta):
        return (meta["weights"][batch["index"]] * by_token(params, batch)).sum(1)

    other = mg.metagradient(held_out, mg.TrainStep(written_out, optimizer), PARAMS, BATCHES, weights)
    assert relative_error(result.meta["weights"], other.meta["weights"]) <= 1e-12
