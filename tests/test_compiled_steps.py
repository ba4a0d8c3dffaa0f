"""A compiled step gives the numbers of the uncompiled one, the same bits every time, and says where it cannot."""

import warnings
from itertools import product

import pytest
import torch
from agreement import assert_agree
from optimizers import OPTIMIZERS
from problems import PROBLEMS

import metagrad as mg
from metagrad._agreement import disagreement
from metagrad._block import After, Block, Wanted, pull
from metagrad._kernels import compiled, tensors
from metagrad._rules import SgdRule
from metagrad._tree import independent

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_compiled_run_is_the_uncompiled_one(name, options):
    """With dropout, batch statistics and running statistics among them."""
    problem = PROBLEMS[name](3)
    compiled, plain = (
        mg.metagradient(*problem.arguments(OPTIMIZERS["adam"], compile=on, **options), wrt_params=True)
        for on in (True, False)
    )
    assert_agree(compiled, plain, rtol=1e-11)


def quadratic(loss, num_steps=3, num_examples=4, **options):
    """A small run on a loss of one parameter vector, with compilation."""
    draw = torch.Generator().manual_seed(0)
    step = mg.TrainStep(mg.weighted(loss), mg.optim.sgd(0.1, momentum=0.5), compile=True, **options)
    batch = {"x": torch.randn(num_examples, 3, generator=draw), "index": torch.arange(num_examples)}
    meta = {"weights": torch.ones(num_examples)}
    return lambda state: state.params["w"].square().sum(), step, {"w": torch.ones(3)}, [batch] * num_steps, meta


def smooth(params, batch):
    return torch.tanh(batch["x"] @ params["w"]).square()


def test_graphs_are_made_once_and_give_the_same_bits():
    arguments = quadratic(smooth, num_steps=6)
    first = mg.metagradient(*arguments, schedule=mg.EveryStep())
    graphs = arguments[1].derivatives.graphs
    made = dict(graphs)
    assert len(made) == 3  # the gradient, and its pullback with and without the parameters
    for schedule in (mg.EveryStep(), mg.Binomial(1), mg.Binomial(2)):
        again = mg.metagradient(*arguments, schedule=schedule)
        assert torch.equal(again.meta["weights"], first.meta["weights"])
    assert graphs == made


def test_what_is_asked_for_twice_costs_one_graph():
    """Two metrics share the gradient's part of the graph."""
    metric, *arguments = quadratic(smooth)
    both = mg.metagradient([metric, lambda state: state.params["w"].sum()], *arguments)
    one = mg.metagradient(metric, *arguments)
    torch.testing.assert_close(both.meta["weights"][0], one.meta["weights"], rtol=1e-12, atol=0)


def test_a_loss_that_reads_a_number_runs_uncompiled_and_says_so():
    def loss(params, batch):
        return smooth(params, batch) if float(params["w"].detach().sum()) > 0 else batch["x"] @ params["w"]

    arguments = quadratic(loss)
    with pytest.warns(UserWarning, match="compile=True has no effect"):
        result = mg.metagradient(*arguments, wrt_params=True)
    assert_agree(result, mg.check.unrolled(*arguments, wrt_params=True), rtol=1e-12)


class WrongWhenTraced(torch.autograd.Function):
    """x², whose derivative is another one under a tracer: what a faulty compiler would do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        wrong = isinstance(x, torch._subclasses.FakeTensor) or type(x) is not torch.Tensor
        return (3 if wrong else 2) * x * cotangent


def test_a_wrong_graph_is_caught():
    arguments = quadratic(lambda params, batch: WrongWhenTraced.apply(batch["x"] @ params["w"]))
    with pytest.warns(UserWarning, match="compile=True has no effect.*differs by"):
        result = mg.metagradient(*arguments)
    exact = mg.check.unrolled(*quadratic(lambda params, batch: (batch["x"] @ params["w"]) ** 2))
    torch.testing.assert_close(result.meta["weights"], exact.meta["weights"], rtol=1e-12, atol=0)


def test_errors_of_the_loss_are_its_own():
    arguments = quadratic(lambda params, batch: smooth(params, batch).reshape(2, 2))
    with pytest.warns(UserWarning, match="compile=True"), pytest.raises(ValueError, match="has shape"):
        mg.metagradient(*arguments)


def test_too_many_shapes_run_uncompiled(monkeypatch):
    monkeypatch.setattr(mg._compiled, "MAX_GRAPHS", 2)
    metric, step, params, _, meta = quadratic(smooth)
    rows = [{"x": torch.ones(n, 3), "index": torch.arange(n)} for n in (1, 2, 3)]
    with pytest.warns(UserWarning, match="too many shapes"):
        result = mg.metagradient(metric, step, params, rows, meta)
    exact = mg.check.unrolled(metric, step, params, rows, meta)
    torch.testing.assert_close(result.meta["weights"], exact.meta["weights"], rtol=1e-12, atol=0)
    assert len(step.derivatives.graphs) == 2


def test_many_optimizers_are_compiled_side_by_side():
    """More kernels than torch keeps of one piece of code; what is asked of each is right."""
    now = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
    given = Block(torch.randn(5), torch.randn(5), [torch.randn(5)]), After(torch.randn(5), [torch.randn(5)])
    for nesterov, decays, state, asked in product([False, True], repeat=4):
        rule, wanted = SgdRule(nesterov, decays), Wanted(state, asked)
        values = tensors(rule.at(now, 1), torch.device("cpu"))
        expected, found = independent([given, torch.zeros(5)]), independent([given, torch.zeros(5)])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="compile=True has no effect")
            shares = compiled(pull)(rule, values, *found[0], found[1], wanted)
        assert shares.keys() == (wanted_shares := pull(rule, values, *expected[0], expected[1], wanted)).keys()
        assert disagreement([found, shares], [expected, wanted_shares]) is None
