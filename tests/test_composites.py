"""Every operation of the table has the right second derivative in every mode, whatever torch's own formulas give."""

from contextlib import nullcontext

import pytest
import torch
from agreement import relative_error
from operations import COMPOSITE, FORWARD, NATIVE, RAISES, REVERSE, WRONG, Operation
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metagrad import DifferentiableStatistics, _modes
from metagrad._composites import Composites
from metagrad._covered import COVERED, OURS
from metagrad._jets import JETS
from metagrad._modes import MODES, REFERENCE, Inputs, Pulled
from metagrad._refusals import graph_of
from metagrad._repairs import Repaired
from metagrad._tree import joined

OPERATIONS = {**COMPOSITE, **NATIVE}
FAST = [FORWARD, REVERSE]
# Right, and refused: see the test of what is covered.
UNTRUSTED = ["batch_norm, evaluated", "instance_norm, evaluated"]

# The nodes of torch's own operations for which there are composites.
UNSAFE = {
    "SoftmaxBackward0",
    "LogSoftmaxBackward0",
    "LogsumexpBackward0",
    "NativeLayerNormBackward0",
    "NativeBatchNormBackward0",
    "NativeGroupNormBackward0",
    "GluBackward0",
    "SiluBackward0",
    "MishBackward0",
    "LogitBackward0",
    "HuberLossBackward0",
    "SoftMarginLossBackward0",
    "ScaledDotProductFlashAttentionForCpuBackward0",
}


class Question:
    """An operation at some numbers, behind a loss that bends, with directions γ: what a mode is asked for."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(*shape, generator=generator) for shape in operation.shapes]
        self.at = Inputs({str(n): x for n, x in enumerate(drawn)}, {}, {"scale": torch.tensor(1.3)})
        self.gamma = [torch.randn(*shape, generator=generator) for shape in operation.shapes]

    def value(self, params: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(0)
            return self.operation.function(*params.values())

    def loss(self, params: dict[str, Tensor], _: dict[str, Tensor], meta: dict[str, Tensor]):
        y = self.value(params)
        a, b = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(2))
        return (a * y + b * y.square()).sum() * meta["scale"], {}

    def answer(self, mode: str, repaired: bool = True) -> Pulled:
        # Composites hold the repairs; the reference is given a loss that does.
        with Repaired() if repaired and mode == REFERENCE else nullcontext():
            return MODES[mode](self.loss, self.at, [self.gamma], [[]], True)[0]

    def difference(self, h: float = 1e-5) -> list[Tensor]:
        """Hγ by central differences of the gradient."""

        def gradient(step: float) -> tuple[Tensor, ...]:
            moved = [(x + step * g).requires_grad_() for x, g in zip(self.at.params.values(), self.gamma, strict=True)]
            params = dict(zip(self.at.params, moved, strict=True))
            return torch.autograd.grad(
                self.loss(params, {}, self.at.meta)[0], moved, allow_unused=True, materialize_grads=True
            )

        return [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)]


def worst(found: Pulled, expected: Pulled) -> float:
    """The largest relative error of the parameters' and the metaparameters' cotangents."""
    whole = [torch.cat([leaf.flatten() for leaf in each.params]) for each in (found, expected)]
    return max(relative_error(*whole), relative_error(found.meta[0], expected.meta[0]))


@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_mode_agrees_with_torchs_reverse_over_reverse(name, mode, monkeypatch):
    if name in UNTRUSTED:
        monkeypatch.setattr(_modes, "refuse_uncovered", lambda loss: None)
    question = Question(OPERATIONS[name])
    assert worst(question.answer(mode), question.answer(REFERENCE)) <= 1e-10


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_agrees_with_finite_differences(name):
    question = Question(OPERATIONS[name])
    found, wanted = question.answer(REFERENCE).params, question.difference()
    assert relative_error(*(torch.cat([leaf.flatten() for leaf in each]) for each in (found, wanted))) <= 1e-6


@pytest.mark.parametrize("rules", [{}, JETS], ids=FAST)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_composite_has_torchs_values_and_random_numbers(name, rules):
    question = Question(OPERATIONS[name])
    native = question.value(question.at.params)
    drawn = torch.get_rng_state()
    with Composites(rules):
        ours = question.value(question.at.params)
    assert ours.shape == native.shape and ours.dtype == native.dtype
    assert relative_error(ours, native) <= 1e-13
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("rules", [{}, JETS], ids=FAST)
@pytest.mark.parametrize("name", COMPOSITE)
def test_no_unsafe_operation_is_differentiated(name, rules):
    question = Question(OPERATIONS[name])
    params = {n: x.clone().requires_grad_() for n, x in question.at.params.items()}
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(*pair) for pair in zip(params.values(), question.gamma, strict=True)
        ]
        with Composites(rules):
            y = question.value(dict(zip(params, duals, strict=True)))
        used = {node.name() for node in graph_of(forward_ad.unpack_dual(y))}
    assert used and not used & UNSAFE


def met(operation: Operation) -> set[str]:
    """The names of the nodes that a fast mode goes through, before a sum of squares and before a product."""
    question, found = Question(operation), set()

    def loss(params, buffers, meta):
        value = question.loss(params, buffers, meta)[0]
        y = question.value(params).flatten()
        value = value + F.linear(y, torch.ones(1, len(y))).sum()
        found.update(node.name() for node in graph_of([value]) if type(node) not in OURS)
        return value, {}

    for mode in FAST:
        MODES[mode](loss, question.at, [question.gamma], [[]], True)
    return found


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the names are those of torch 2.13")
def test_what_is_covered_is_what_is_tested(monkeypatch):
    """Every name is met by an operation whose derivatives are tested here, and all that such operations meet are named.

    But for a norm of evaluation, whose name is that of one in training, which torch gets wrong; and for another type,
    which has tests of its own.
    """
    monkeypatch.setattr(_modes, "refuse_uncovered", lambda loss: None)
    names = set().union(*map(met, OPERATIONS.values()))
    assert names - {"NativeBatchNormBackward0"} == COVERED - {"ToCopyBackward0"}


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the table is that of torch 2.13")
@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize("name", OPERATIONS)
def test_composites_are_where_torch_needs_them(name, mode, monkeypatch):
    """The table is right, for every operation and mode: where torch is right by itself, too."""
    monkeypatch.setattr(_modes, "Composites", lambda *_: nullcontext())
    monkeypatch.setattr(_modes, "refuse_uncovered", lambda loss: None)
    question = Question(OPERATIONS[name])
    expected = question.answer(REFERENCE)
    try:
        found = RAISES if (error := worst(question.answer(mode), expected)) is None else WRONG if error > 1e-6 else None
    except (RuntimeError, NotImplementedError):
        found = RAISES
    assert found == OPERATIONS[name].natively.get(mode)


# Corners of single operations.


@pytest.mark.parametrize("mode", FAST)
def test_large_numbers_in_float32(mode):
    """As exact as torch's own: the same derivatives as in float64 but for rounding, where exp(x) has no value."""

    def loss(params, _, meta):
        x = params["x"]
        losses = F.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="none")
        parts = x.softmax(1).square().sum(1), x.log_softmax(1)[:, 0] * 1e-3, x.logsumexp(1) * 1e-3
        return (meta["w"] * (losses + sum(parts))).sum(), {}

    x = torch.tensor([[150.0, 149.0, -2e4], [-300.0, 0.0, -1.0], [88.0, 90.0, 89.5]])
    gamma = torch.tensor([[1.0, -1.0, 0.5], [0.3, 1.0, -2.0], [1.0, 1.0, -1.0]])
    found, wanted = (
        MODES[m](loss, Inputs({"x": x.to(d)}, {}, {"w": torch.ones(3, dtype=d)}), [[gamma.to(d)]], [[]], True)[0]
        for m, d in [(mode, torch.float32), (REFERENCE, torch.float64)]
    )
    assert worst(Pulled(*([leaf.double() for leaf in each] for each in found)), wanted) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_types_keep_their_type(dtype):
    """Inside such an operation torch computes in float32, and so does a composite."""
    operations = {
        "softmax": lambda x: F.softmax(x, 1),
        "losses": lambda x: F.cross_entropy(x, torch.tensor([1, 2, 3]), reduction="none"),
        "layer_norm": lambda x: F.layer_norm(x, (5,)),
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        "silu": F.silu,
    }
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for operation in operations.values():
        with Composites({}):
            ours = operation(x)
        assert ours.dtype == dtype
        assert relative_error(ours.double(), operation(x).double()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("norm", ["batch_norm", "instance_norm"])
def test_running_statistics_are_differentiated_whichever_mode_is_outer(norm, outer, mode, monkeypatch):
    layer = getattr(F, norm)

    def loss(params, buffers, meta):
        after = {name: value.clone() for name, value in buffers.items()}
        with DifferentiableStatistics() if not outer else nullcontext():
            y = layer(params["x"], after["mean"], after["var"], params["w"], params["b"], True, 0.3)
            z = layer(params["x"].sin(), after["mean"], after["var"], params["w"], None, False)
        return ((y * z).square() * meta["scale"]).sum(), after

    draw = torch.Generator().manual_seed(3)
    params = {name: torch.randn(*s, generator=draw) for name, s in [("x", (3, 4, 5)), ("w", (4,)), ("b", (4,))]}
    buffers = {"mean": torch.randn(4, generator=draw), "var": torch.rand(4, generator=draw) + 0.5}
    at = Inputs(params, buffers, {"scale": torch.tensor(1.2)})
    gamma, end = ([torch.randn(*x.shape, generator=draw) for x in each.values()] for each in (params, buffers))
    with DifferentiableStatistics() if outer else nullcontext():
        found, wanted = (MODES[m](loss, at, [gamma], [end], True)[0] for m in (mode, REFERENCE))
    assert min(float(leaf.abs().max()) for leaf in joined(wanted)) > 1e-3
    assert max(relative_error(a, b) for a, b in zip(joined(found), joined(wanted), strict=True)) <= 1e-10


def test_constant_running_statistics_are_those_of_torch():
    x, ours, theirs = torch.randn(3, 4, 5), [torch.zeros(4), torch.ones(4)], [torch.zeros(4), torch.ones(4)]
    for layer in F.batch_norm, F.instance_norm:
        layer(x, *theirs, None, None, True)
        with Composites({}):
            layer(x.clone().requires_grad_(), *ours, None, None, True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", FAST)
def test_a_gradient_stopped_by_no_grad_is_stopped(mode):
    def loss(params, _, meta):
        x = params["x"]
        with torch.no_grad():
            scale = x.norm() + F.softmax(x, 0)[0]
        return (x.sin() / scale).sum() * meta["scale"], {}

    at = Inputs({"x": torch.tensor([0.3, -1.2, 2.0])}, {}, {"scale": torch.tensor(1.0)})
    gamma = [torch.tensor([1.0, 0.5, -0.2])]
    assert worst(*(MODES[m](loss, at, [gamma], [[]], True)[0] for m in (mode, REFERENCE))) <= 1e-12


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
@pytest.mark.parametrize("mode", MODES)
def test_chunks_that_torch_cannot_differentiate_twice_are_refused(mode):
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(params, _, meta):
        return F.linear_cross_entropy(params["h"], params["w"], torch.tensor([0, 1]), options=options), {}

    at = Inputs({"h": torch.randn(2, 3), "w": torch.randn(4, 3)}, {}, {})
    with pytest.raises(RuntimeError, match="mg.linear_cross_entropy"), Repaired():
        MODES[mode](loss, at, [[torch.ones(2, 3), torch.ones(4, 3)]], [[]], True)


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the repair is that of torch 2.13")
def test_torchs_own_weight_norm_is_wrong_twice_differentiated():
    """The repair is needed: its second derivative by reverse mode over reverse mode is no difference of gradients."""
    question = Question(OPERATIONS["weight_norm"])
    assert relative_error(question.answer(REFERENCE, repaired=False).params[-1], question.difference()[-1]) > 0.1


@pytest.mark.parametrize("mode", FAST)
def test_a_loss_with_a_gradient_of_its_own_is_refused(mode):
    def loss(params, _, meta):
        x = params["x"]
        inner = torch.autograd.grad(F.softmax(x, 0).square().sum(), x, create_graph=True)[0]
        return inner.square().sum() * meta["scale"], {}

    at = Inputs({"x": torch.tensor([0.3, -1.2, 2.0])}, {}, {"scale": torch.tensor(1.0)})
    with pytest.raises(NotImplementedError, match="takes a gradient itself"):
        MODES[mode](loss, at, [[torch.ones(3)]], [[]], True)
