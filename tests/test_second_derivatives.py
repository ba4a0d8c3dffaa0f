"""Every order of forward and reverse mode gives the same way back through a gradient, and the fastest is taken."""

import time
import warnings

import pytest
import torch
from agreement import relative_error
from problems import PROBLEMS
from torch.nn.functional import grid_sample

import metagrad as mg
from metagrad import _choice, _modes
from metagrad._agreement import disagreement
from metagrad._choice import AUTO, choose
from metagrad._covered import UncoveredError
from metagrad._evaluation import Evaluation, Point
from metagrad._modes import MODES, REFERENCE, Inputs, Pulled
from metagrad._tree import floating_leaves, joined, with_floating_leaves

FAST = [mode for mode in MODES if mode != REFERENCE]


class Case:
    """A problem's first step, with two γ and two cotangents of the buffers after it."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.problem = PROBLEMS[name](1)
        self.step = self.problem.step(mg.optim.sgd(1.0))
        self.state = self.step.init(self.problem.params, self.problem.meta)
        self.dtype = dtype
        self.at = self._cast(Inputs(self.state.params, self.state.buffers, self.problem.meta))
        draw = torch.Generator().manual_seed(3)
        self.gammas, self.ends = (
            [self._cast([torch.randn(leaf.shape, generator=draw) for leaf in floating_leaves(tree)]) for _ in range(2)]
            for tree in (self.at.params, self.at.buffers)
        )

    def _cast(self, tree):
        return with_floating_leaves(tree, [leaf.to(self.dtype) for leaf in floating_leaves(tree)])

    def loss(self, params, buffers, meta):
        torch.set_rng_state(self.state.rng[0])
        batch = self._cast(self.problem.batches[0])
        evaluated = Evaluation(self.step.loss, 0, None, None, False)(Point(params, buffers, batch, meta))
        return evaluated.share, evaluated.buffers

    def pulled(self, mode: str, wrt_params: bool = True) -> list[Pulled]:
        return MODES[mode](self.loss, self.at, self.gammas, self.ends, wrt_params)


def errors(found: Pulled, expected: Pulled) -> list[float]:
    return [relative_error(a, b) for a, b in zip(joined(found), joined(expected), strict=True)]


@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize("name", PROBLEMS)
def test_modes_agree_on_models(name, mode):
    case = Case(name)
    expected = case.pulled(REFERENCE)
    for found, wanted in zip(case.pulled(mode), expected, strict=True):
        assert max(errors(found, wanted)) <= 1e-9
    for found, wanted in zip(case.pulled(mode, wrt_params=False), expected, strict=True):
        assert found.params == []
        assert max(errors(found, wanted._replace(params=[]))) <= 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_modes_are_the_derivative_of_a_step(name, mode):
    """θ′ = θ − g and b′ after it, as plain autograd through the whole step has them, for Φ = ⟨−γ, θ′⟩ + ⟨end, b′⟩."""
    case = Case(name)
    gamma, end = case.gammas[0], case.ends[0]

    def metric(state):
        parts = zip([-c for c in gamma] + end, [*state.params.values(), *floating_leaves(state.buffers)], strict=True)
        return sum((c * leaf).sum() for c, leaf in parts)

    exact = mg.check.unrolled(
        metric, case.step, case.problem.params, case.problem.batches, case.at.meta, wrt_params=True
    )
    found = case.pulled(mode)[0]
    for h_gamma, c, wanted in zip(found.params, gamma, exact.params.values(), strict=True):
        assert relative_error(h_gamma - c, wanted) <= 1e-9
    for leaf, wanted in zip(found.buffers, floating_leaves(exact.buffers), strict=True):
        assert relative_error(leaf, wanted) <= 1e-9
    assert relative_error(found.meta[0], exact.meta["weights"]) <= 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_none_stands_for_zeros(mode):
    case = Case("cnn")
    zeros = [
        [torch.zeros_like(c) if n % 2 else c for n, c in enumerate(each)] for each in (case.gammas[0], case.ends[0])
    ]
    nones = [[None if n % 2 else c for n, c in enumerate(each)] for each in (case.gammas[0], case.ends[0])]
    found, wanted = (MODES[mode](case.loss, case.at, [g], [e], True)[0] for g, e in (nones, zeros))
    assert max(errors(found, wanted)) <= 1e-12
    nothing = MODES[mode](case.loss, case.at, [[None] * len(zeros[0])], [[None] * len(zeros[1])], True)[0]
    assert not any(leaf.any() for leaf in joined(nothing))


@pytest.mark.parametrize("mode", MODES)
def test_parameters_keep_their_order(mode):
    """That of the dict, of which γ has it: H = diag(6, 2) in it, and not in the order of names."""
    at = Inputs({"z": torch.tensor(1.0), "a": torch.tensor(5.0)}, {}, {})
    found = MODES[mode](
        lambda p, _, __: (p["z"] ** 3 + p["a"] ** 2, {}), at, [[torch.tensor(1.0), torch.tensor(10.0)]], [[]], True
    )
    assert [float(leaf) for leaf in found[0].params] == [6.0, 20.0]


@pytest.mark.parametrize("mode", FAST)
def test_nothing_is_left_behind(mode):
    """No tangent, no gradient and no changed tensor in what the loss was evaluated at."""
    case = Case("cnn")
    before = [leaf.clone() for leaf in floating_leaves(case.at)]
    case.pulled(mode)
    for leaf, value in zip(floating_leaves(case.at), before, strict=True):
        assert torch.equal(leaf, value) and leaf.grad is None and not leaf.requires_grad


# The choice.


class Wrong(torch.autograd.Function):
    """sin, with a forward-mode derivative of the wrong sign; its backward can be differentiated again."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        return ctx.saved_tensors[0].cos() * cotangent

    @staticmethod
    def jvp(ctx, tangent):
        return -ctx.saved_tensors[0].cos() * tangent


class Missing(torch.autograd.Function):
    """sin, without a forward-mode derivative."""

    forward = staticmethod(lambda ctx, x: (ctx.save_for_backward(x), x.sin())[1])
    backward = staticmethod(lambda ctx, cotangent: ctx.saved_tensors[0].cos() * cotangent)


AT = Inputs(
    {"x": torch.linspace(0.1, 0.9, 16).view(4, 4) + torch.eye(4)}, {}, {"w": torch.linspace(1, 2, 16).view(4, 4)}
)
GAMMAS = [[torch.linspace(-1, 2, 16).view(4, 4)]]


@pytest.fixture
def trusting(monkeypatch):
    """Modes that are trusted with every operation."""
    monkeypatch.setattr(_modes, "refuse_uncovered", lambda loss: None)


def loss_of(function):
    return lambda p, _, meta: ((meta["w"] * function(p["x"])).square().sum(), {})


def chosen(function, requested=AUTO):
    return choose(requested, loss_of(function), AT)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_mode_is_rejected_on_models(name, dtype):
    case = Case(name, dtype)
    choice = choose(AUTO, case.loss, case.at)
    assert choice.rejected == {} and choice.seconds.keys() == MODES.keys()
    assert choice.mode == min(choice.seconds, key=choice.seconds.get)


@pytest.mark.parametrize(
    "function",
    [Wrong.apply, lambda x: torch.linalg.slogdet(x)[1], lambda x: torch.linalg.solve(x, x.T.sin())],
    ids=["planted", "torch's slogdet", "torch's solve"],
)
@pytest.mark.parametrize("requested", [AUTO, *FAST])
def test_a_wrong_derivative_is_caught(requested, function, trusting):
    with pytest.warns(UserWarning, match="gives another derivative of this loss") as caught:
        choice = chosen(function, requested)
    assert len(caught) == 1
    assert choice.mode == REFERENCE
    assert choice.rejected.keys() == ({*FAST} if requested == AUTO else {requested})


@pytest.mark.parametrize("requested", [AUTO, *FAST])
@pytest.mark.parametrize(
    "function, name",
    [
        (Wrong.apply, "WrongBackward"),
        (lambda x: torch.linalg.slogdet(x)[1], "LinalgSlogdetBackward0"),
        (lambda x: torch.native_layer_norm(x, [4], None, None, 1e-5)[0], "NativeLayerNormBackward0"),
    ],
)
def test_an_operation_that_is_not_covered_is_refused(requested, function, name):
    with pytest.raises(UncoveredError, match=name):
        chosen(function, requested)


def through_float32(x):
    return (x.float() @ x.float().T).softmax(1).to(x)


def autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x.float() @ x.float().T).softmax(1).to(x)


@pytest.mark.parametrize("function", [through_float32, autocast])
def test_the_rounding_of_a_coarser_type_on_the_way_is_no_wrong_derivative(function):
    """As of the norm of a Llama, which computes in float32 whatever it is given."""
    assert chosen(function).rejected == {}


@pytest.mark.parametrize("requested", FAST)
def test_a_coarse_type_beside_the_loss_hides_no_wrong_derivative(requested, trusting):
    def function(x):
        torch.ones(3).bfloat16().square()
        return Wrong.apply(x)

    with pytest.warns(UserWarning, match="gives another derivative of this loss"):
        assert chosen(function, requested).mode == REFERENCE


def test_a_missing_formula_is_recorded_and_said(trusting):
    with pytest.warns(UserWarning, match="and reverse-over-forward cannot differentiate this loss"):
        choice = chosen(Missing.apply)
    assert choice.mode == REFERENCE
    assert all("jvp" in choice.rejected[mode] for mode in FAST)


def sampled(x: torch.Tensor) -> torch.Tensor:
    """A picture, looked up at places that depend on it."""
    return grid_sample(x[None, None], x.tanh().view(1, 2, 4, 2), align_corners=False).sum()


@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize(
    "function, named",
    [
        (Missing.apply, "jvp"),
        pytest.param(
            sampled,
            "grid_sampler_2d",
            marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 has the formula"),
        ),
    ],
)
def test_a_missing_formula_of_a_mode_that_was_named_is_said(mode, function, named, trusting):
    with pytest.warns(UserWarning, match=f"{mode} cannot differentiate this loss .*{named}"):
        assert chosen(function, mode).mode == REFERENCE


@pytest.mark.parametrize("mode", FAST)
def test_a_mode_that_was_named_is_taken(mode):
    choice = chosen(torch.tanh, mode)
    assert choice.mode == mode and choice.rejected == {}


@pytest.mark.parametrize("fastest", MODES)
def test_the_fastest_is_taken_by_its_second_run(fastest, monkeypatch):
    """The first run of a mode pays for what later ones do not: here it is slow where the second is not."""
    runs = dict.fromkeys(MODES, 0)

    def timed(name, mode):
        def run(*arguments):
            runs[name] += 1
            time.sleep(0.05 if (runs[name] == 1) == (name == fastest) else 0.0)
            return mode(*arguments)

        return run

    monkeypatch.setattr(_choice, "MODES", {name: timed(name, mode) for name, mode in MODES.items()})
    choice = chosen(torch.tanh)
    assert choice.mode == fastest and set(runs.values()) == {2}


def test_what_is_not_finite_is_left_to_the_reference():
    """√x at 0: no mode can be compared, and none is blamed."""
    at = AT._replace(params={"x": torch.zeros(4, 4)})
    with warnings.catch_warnings(action="error"):
        choice = choose(AUTO, loss_of(torch.sqrt), at)
    assert choice.mode == REFERENCE and all("not finite" in reason for reason in choice.rejected.values())


def test_an_error_of_the_loss_itself_is_the_users():
    def loss(*_):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="^my own$"):
        choose(AUTO, loss, AT)


# Agreement.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agreement_is_judged_tensor_by_tensor(dtype):
    """A wrong tensor is seen beside one that is 2000 times as large."""
    rounding = 50 * torch.finfo(dtype).eps
    large, small = (torch.full((5,), value, dtype=dtype) for value in (1e3, 0.5))
    assert disagreement([large * (1 + rounding), small * (1 - rounding)], [large, small], 0.0) is None
    assert "tensor 1" in disagreement([large, small * 1.1], [large, small], 0.0)
    assert "tensor 0" in disagreement([large * 1.01, small], [large, small], 0.0)


@pytest.mark.parametrize("mode", FAST)
def test_metaparameters_are_judged_beside_the_parameters(mode, monkeypatch):
    """Their cotangents are 1e-9 of the parameters' here, and wrong."""

    def loss(params, _, meta):
        return 1e9 * params["x"].pow(3).sum() + (params["x"] * meta["w"]).sum(), {}

    def wrong(*given):
        return [each._replace(meta=[1.01 * leaf for leaf in each.meta]) for each in MODES[mode](*given)]

    monkeypatch.setattr(_choice, "MODES", {**MODES, mode: wrong})
    with pytest.warns(UserWarning, match="gives another derivative"):
        assert choose(mode, loss, AT).mode == REFERENCE


def test_rounding_in_the_place_of_zero_agrees():
    """As of a bias that a softmax cancels: nothing in it is right but its size."""
    noise = 1e-15 * torch.tensor([1.0, -2.0])
    assert disagreement([torch.ones(5), noise], [torch.ones(5), -noise], 0.0) is None
