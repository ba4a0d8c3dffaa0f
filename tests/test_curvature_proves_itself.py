"""Whatever way second derivatives are asked for, what comes back is right: a wrong way is caught, and says so."""

import warnings

import pytest
import torch
from agreement import assert_agree
from optimizers import OPTIMIZERS
from problems import PROBLEMS

import metagrad as mg
from metagrad import _covered

FAST = ["forward-over-reverse", "reverse-over-forward"]


class Planted(torch.autograd.Function):
    """x³, with a backward that can be differentiated again and a forward-mode derivative that is 10 % too large."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent

    @staticmethod
    def jvp(ctx, tangent):
        return 3.3 * ctx.saved_tensors[0] ** 2 * tangent


class Unknown(torch.autograd.Function):
    """x³ without a formula for forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, cotangent):
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


def arguments(cube, **options):
    """Three steps on a loss through `cube`."""
    step = mg.TrainStep(mg.weighted(lambda p, b: torch.tanh(cube(b["x"] @ p["w"]))), OPTIMIZERS["adam"], **options)
    draw = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(4, 3, generator=draw), "index": torch.arange(4)}
    params = {"w": torch.randn(3, generator=draw)}
    return lambda state: state.params["w"].square().sum(), step, params, [batch] * 3, {"weights": torch.ones(4)}


def exact():
    return mg.check.unrolled(*arguments(lambda x: x**3), wrt_params=True)


@pytest.mark.parametrize(
    "cube, message",
    [
        (Planted.apply, "has no effect on a loss with PlantedBackward"),
        (Unknown.apply, "cannot differentiate this loss .*You must implement"),
    ],
    ids=["wrong", "missing"],
)
@pytest.mark.parametrize("curvature", ["auto", *FAST])
def test_an_operation_that_is_not_covered_takes_the_exact_way_and_says_so_once(curvature, cube, message):
    with pytest.warns(UserWarning, match=message) as caught:
        result = mg.metagradient(*arguments(cube, curvature=curvature), wrt_params=True)
    assert len([warning for warning in caught if "takes its place" in str(warning.message)]) == 1
    assert_agree(result, exact(), rtol=1e-12)
    assert result.stats.curvature == "reverse-over-reverse"


@pytest.mark.parametrize("curvature", ["auto", *FAST])
def test_a_wrong_derivative_of_a_covered_operation_is_caught(curvature, monkeypatch):
    """The second line of defence, also where the run's own cotangents are zeros at first."""
    monkeypatch.setattr(_covered, "COVERED", _covered.COVERED | {"PlantedBackward"})
    metric, *others = arguments(Planted.apply, curvature=curvature)
    early = mg.Trajectory({2: metric})
    with pytest.warns(UserWarning, match="another derivative of this loss than reverse-over-reverse") as caught:
        result = mg.metagradient(early, *others, wrt_params=True)
    assert len([warning for warning in caught if "another derivative" in str(warning.message)]) == 1
    assert_agree(result, mg.check.unrolled(early, *arguments(lambda x: x**3)[1:], wrt_params=True), rtol=1e-12)
    assert result.stats.curvature == "reverse-over-reverse"


@pytest.mark.parametrize("curvature", FAST)
@pytest.mark.parametrize("name", PROBLEMS)
def test_models_take_the_way_that_was_named(name, curvature):
    """Batch norm, dropout, attention, layer norm, GELU, SiLU and cross-entropy among them."""
    problem = PROBLEMS[name](3)
    with warnings.catch_warnings(action="error"):
        found = mg.metagradient(*problem.arguments(OPTIMIZERS["adam"], curvature=curvature), wrt_params=True)
    assert found.stats.curvature == curvature
    assert_agree(found, mg.metagradient(*problem.arguments(OPTIMIZERS["adam"]), wrt_params=True), rtol=1e-11)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_fastest_is_one_of_them(name):
    result = mg.metagradient(*PROBLEMS[name](2).arguments(OPTIMIZERS["sgd"], curvature="auto"))
    assert result.stats.curvature in ("reverse-over-reverse", *FAST)


@pytest.mark.parametrize("cube", [Planted.apply, Unknown.apply])
@pytest.mark.parametrize("curvature", ["auto", *FAST])
def test_an_operation_that_is_met_later_takes_the_exact_way_too(curvature, cube):
    """Only the first step of three, the last to be reversed, goes through `cube`; the choice is made before."""
    metric, _, params, batches, meta = arguments(cube)
    loss = mg.weighted(lambda p, b: torch.tanh((cube if b["first"] else lambda x: x**3)(b["x"] @ p["w"])))
    step = mg.TrainStep(loss, OPTIMIZERS["adam"], curvature=curvature)
    batches = [{**batch, "first": t == 0} for t, batch in enumerate(batches)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = mg.metagradient(metric, step, params, batches, meta, wrt_params=True)
    assert curvature == "auto" or any("has no effect" in str(warning.message) for warning in caught)
    assert_agree(result, exact(), rtol=1e-12)


def test_several_metrics_share_a_choice():
    metric, *others = arguments(lambda x: x**3, curvature="reverse-over-forward")
    both = mg.metagradient([metric, lambda state: state.params["w"].sum()], *others, wrt_params=True)
    assert_agree(mg.metagradient(metric, *others, wrt_params=True), _first(both), rtol=1e-12)


def _first(result):
    return result._replace(
        value=result.value[0],
        meta={name: value[0] for name, value in result.meta.items()},
        params={name: value[0] for name, value in result.params.items()},
    )


def test_compiled_and_plain_steps_say_what_they_did():
    assert mg.metagradient(*arguments(lambda x: x**3)).stats.curvature == "reverse-over-reverse"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"curvature": "fast"}, "`curvature` is 'fast'. Pass one of 'auto', 'reverse-over-reverse'"),
        ({"curvature": "auto", "compile": True}, "with compile=True the curvature is"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        arguments(lambda x: x**3, **options)


def test_a_run_that_must_go_on_as_it_began_names_its_way(tmp_path):
    with pytest.raises(ValueError, match="goes by the clock"):
        mg.metagradient(*arguments(lambda x: x**3, curvature="auto"), resume=tmp_path / "run")
