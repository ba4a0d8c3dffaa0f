"""The pullbacks of the optimizers, written by hand and done in blocks, against autograd through the same update."""

import weakref
from contextlib import contextmanager

import pytest
import torch
import torchopt
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optimizers import SMOOTH, by_shape
from torch.utils._python_dispatch import TorchDispatchMode

import metagrad as mg
from metagrad import _elementwise
from metagrad._reverse import pull_gradient
from metagrad._transformation import Given, Made, chained
from metagrad._tree import floating_leaves, fresh, independent, with_floating_leaves

HYPERPARAMETERS = {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "decay": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 1e-3}
META = {name: torch.tensor(value) for name, value in HYPERPARAMETERS.items()}


def adam(meta, make=mg.optim.adam):
    return make(meta["lr"], (meta["beta1"], meta["beta2"]), meta["eps"], 10 * meta["eps"], meta["decay"])


MAKERS = {
    "sgd": lambda z: mg.optim.sgd(z["lr"], weight_decay=z["decay"]),
    "no momentum": lambda z: mg.optim.sgd(z["lr"], 0.0, z["dampening"]),
    "momentum": lambda z: mg.optim.sgd(z["lr"], z["momentum"], z["dampening"], weight_decay=z["decay"]),
    "nesterov": lambda z: mg.optim.sgd(z["lr"], z["momentum"], z["dampening"], nesterov=True, weight_decay=z["decay"]),
    "adam": adam,
    "adamw": lambda z: adam(z, mg.optim.adamw),
    "adamw without meta": lambda z: mg.optim.adamw(0.05, **SMOOTH, weight_decay=0.1),
    "rates by step": lambda z: mg.optim.adam(lambda step: z["lr"] / (1 + step), **SMOOTH),
    "groups": lambda z: mg.optim.groups(by_shape, {"matrix": adam(z), "vector": mg.optim.sgd(z["lr"])}),
    "clipped": lambda z: chained(mg.optim.clip(0.5 * z["momentum"]), adam(z)),
    "muon": lambda z: mg.optim.muon(z["lr"], z["momentum"], others=adam(z)),
    "torchopt": lambda z: mg.optim.adapt(torchopt.adam(0.05, eps_root=1e-3)),
}


def problem(maker, shapes, num_steps, seed):
    """An update after some steps, with cotangents of what it makes, and the metaparameters as leaves."""
    draw = torch.Generator().manual_seed(seed)
    trees = [{f"p{i}": torch.randn(shape, generator=draw) for i, shape in enumerate(shapes)} for _ in range(4)]
    params, gradient, change, earlier = trees
    meta = fresh(META)
    optimizer = maker(meta)
    with torch.no_grad():
        state = optimizer.init(params)
        for _ in range(num_steps):
            state = optimizer.update(earlier, state, params=params, inplace=False)[1]
    ends = [torch.randn(leaf.shape, generator=draw) for leaf in floating_leaves(state)]
    return optimizer, Given(gradient, state, params), Made(change, with_floating_leaves(state, ends)), meta


def updates_in_blocks(test):
    """`test` on small updates in small blocks, and on one that fills a block of the usual size."""
    drawn = given(
        shapes=st.lists(st.lists(st.integers(1, 5), max_size=2), min_size=1, max_size=5),
        num_steps=st.integers(0, 3),
        block=st.integers(1, 30),
        seed=st.integers(0, 99),
    )
    large = example(shapes=[[300, 300], [7], [40000], []], num_steps=2, block=_elementwise.CACHED, seed=1)
    return settings(max_examples=15, deadline=None)(large(drawn(test)))


@contextmanager
def in_blocks_of(entries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_elementwise, "CACHED", entries)
        yield


def plus(params, updates):
    return {name: p + updates[name] for name, p in params.items()}


def by_autograd(optimizer, given, cotangent, meta):
    given = fresh(given)
    updates, state = optimizer.update(given.gradient, given.state, params=given.params, inplace=False)
    made = Made(plus(given.params, updates), state)
    inputs = [*floating_leaves(given), *floating_leaves(meta)]
    return pull_gradient(floating_leaves(made), inputs, [floating_leaves(cotangent)], retain_graph=True)[0]


def by_pullback(optimizer, given, cotangent, meta):
    back, to_meta = optimizer.pull(given, independent(cotangent), floating_leaves(meta), True)
    return [*floating_leaves(back), *to_meta]


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", MAKERS)
@updates_in_blocks
def test_a_pullback_is_that_of_autograd(name, shapes, num_steps, block, seed):
    arguments = problem(MAKERS[name], shapes, num_steps, seed)
    with in_blocks_of(block):
        found = by_pullback(*arguments)
    assert_equal(found, by_autograd(*arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of compilers
@pytest.mark.parametrize("name", ["nesterov", "adamw", "clipped", "groups"])
def test_compiled_kernels_give_the_same(name):
    optimizer, given, cotangent, meta = problem(MAKERS[name], [[300, 300], [7], []], 2, seed=3)
    fast = optimizer.compiled()
    with torch.no_grad():
        made = [o.apply(*given) for o in (fast, optimizer)]
    assert_equal(*map(floating_leaves, made))
    assert_equal(*(by_pullback(o, given, cotangent, meta) for o in (fast, optimizer)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_kernel_serves_all_steps_and_rates():
    """Step counts and learning rates are data to it."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for rate in (0.1, 0.2, 0.3):
        optimizer, given, cotangent, _ = problem(
            lambda z, rate=rate: mg.optim.adam(lambda step: rate / (1 + step), **SMOOTH), [[50, 7]], int(10 * rate), 0
        )
        with torch.no_grad():
            optimizer.compiled().apply(*given)
    assert counters["stats"]["unique_graphs"] <= 1


@pytest.mark.parametrize("name", MAKERS)
@updates_in_blocks
def test_an_update_in_blocks_is_the_one_that_has_a_graph(name, shapes, num_steps, block, seed):
    optimizer, (gradient, state, params), _, _ = problem(MAKERS[name], shapes, num_steps, seed)
    with in_blocks_of(block), torch.no_grad():
        found = optimizer.apply(gradient, state, params)
    updates, new = optimizer.update(gradient, state, params=params, inplace=False)
    assert_equal(floating_leaves(found), floating_leaves(Made(plus(params, updates), new)))
    with_graph = optimizer.apply(fresh(gradient), state, params)
    assert_equal(floating_leaves(found), floating_leaves(with_graph))
    assert all(leaf.requires_grad for leaf in floating_leaves(with_graph.params))


def test_tensors_of_two_types_and_other_layouts_are_not_mixed_up():
    optimizer = mg.optim.adamw(0.05, **SMOOTH, weight_decay=0.1)
    params = {"a": torch.randn(3, 4).mT, "b": torch.randn(5, dtype=torch.float32), "c": torch.randn(2, 6)}
    gradient = {name: torch.randn_like(p) for name, p in params.items()}
    given = Given(gradient, optimizer.init(params), params)
    cotangent = Made({name: torch.randn_like(p) for name, p in params.items()}, given.state)
    single, double = {"rtol": 1e-5, "atol": 1e-6}, {"rtol": 1e-11, "atol": 1e-14}
    for ours, theirs in zip(
        by_pullback(optimizer, given, cotangent, {}), by_autograd(optimizer, given, cotangent, {}), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **(single if ours.dtype == torch.float32 else double))


class Living(TorchDispatchMode):
    """The most bytes that storages made inside hold at a time."""

    def __init__(self, before):
        super().__init__()
        self.seen = {leaf.untyped_storage().data_ptr() for leaf in before}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in made if isinstance(made, tuple | list) else [made]:
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.seen:
                self._born(leaf.untyped_storage())
        return made

    def _born(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        self.seen.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._died, place, size)

    def _died(self, place, size):
        self.seen.discard(place)
        self.now -= size


@pytest.mark.parametrize("name", ["adamw without meta", "sgd", "rates by step"])
def test_a_pullback_takes_no_more_than_a_vector_of_parameters(name):
    """For the gradient's cotangent; and some blocks."""
    arguments = problem(MAKERS[name], [[1000, 1000], [2000, 1500]], 1, seed=0)
    size = 8 * 4_000_000
    with Living(floating_leaves(arguments)) as living, torch.no_grad():
        arguments[0].pull(*arguments[1:3], [], True)
    assert size <= living.most <= size + 20 * 8 * _elementwise.CACHED


@pytest.mark.parametrize("name, vectors", [("adamw without meta", 3), ("sgd", 1)])
def test_an_update_takes_what_it_makes(name, vectors):
    """And some blocks."""
    optimizer, given, _, _ = problem(MAKERS[name], [[1000, 1000], [2000, 1500]], 1, seed=0)
    size = 8 * 4_000_000
    with Living(floating_leaves(given)) as living, torch.no_grad():
        optimizer.apply(*given)
    assert vectors * size <= living.most <= vectors * size + 20 * 8 * _elementwise.CACHED


MIXED = {
    "adamw": lambda z: mg.optim.adamw(z["lr"], weight_decay=z["decay"]),
    "nesterov": MAKERS["nesterov"],
    "groups": MAKERS["groups"],
    "clipped": lambda z: chained(mg.optim.clip(0.5 * z["momentum"]), mg.optim.adamw(z["lr"])),
}


@pytest.mark.parametrize("name", MIXED)
def test_hyperparameters_in_float64_leave_every_parameter_its_type(name):
    """One of shape () among them, with a graph and without."""
    params = {"a": torch.randn(3, 4, dtype=torch.float32), "s": torch.randn((), dtype=torch.float32)}
    meta = fresh(META)
    optimizer = MIXED[name](meta)
    given = Given({n: torch.randn_like(p) for n, p in params.items()}, optimizer.init(params), params)
    with torch.no_grad():
        plain = optimizer.apply(*given)
    with_graph = optimizer.apply(*fresh(given))
    for one, other in zip(floating_leaves(plain), floating_leaves(with_graph), strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)


def test_a_decay_rate_in_float32_has_a_derivative_to_float32():
    """Of 0.999 in float32, 1 - 0.999 keeps four digits."""
    found = []
    for dtype in (torch.float32, torch.float64):
        beta = torch.tensor(0.999, dtype=torch.float32).to(dtype).requires_grad_()
        optimizer = mg.optim.adamw(0.1, (0.9, beta))
        column = {"a": torch.linspace(1, 3, 5, dtype=dtype)}
        state = optimizer.init(column)._replace(step=torch.tensor(3), mean=column, square={"a": 1e-3 * column["a"]})
        ends = Made(column, with_floating_leaves(state, [torch.zeros(5, dtype=dtype)] * 2))
        found.append(optimizer.pull(Given(column, state, column), ends, [beta], False)[1][0].double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
