"""Operations of torch that a loss may use, as functions of a few tensors: the table of `test_composites`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

FORWARD, REVERSE = "forward-over-reverse", "reverse-over-forward"
RAISES, WRONG = "raises", "is wrong"


@dataclass(frozen=True)
class Operation:
    """A function of tensors of the given shapes, and in which modes torch by itself cannot differentiate it."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = ((3, 5),)
    natively: dict[str, str] = field(default_factory=dict)


def labels(*shape: int, ignored: int = 0) -> Tensor:
    """Five classes; the first few labels are −100."""
    drawn = torch.randint(5, shape, generator=torch.Generator().manual_seed(4))
    drawn.view(-1)[:ignored] = -100
    return drawn


def constant(*shape: int) -> Tensor:
    """Numbers that are not differentiated."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def positive(*shape: int) -> Tensor:
    """Numbers between 0 and 1 that are not differentiated."""
    return constant(*shape).sigmoid()


def module(make: Callable[[], nn.Module], *inputs: tuple[int, ...], **natively: str) -> Operation:
    """A module in training mode, as a function of its inputs and its parameters."""
    model = make().train()
    names = [name for name, _ in model.named_parameters()]

    def function(*tensors: Tensor) -> Tensor:
        given, parameters = tensors[: len(inputs)], tensors[len(inputs) :]
        result = functional_call(model, dict(zip(names, parameters, strict=True)), given)
        return result[0] if isinstance(result, tuple) else result

    return Operation(function, (*inputs, *(tuple(p.shape) for p in model.parameters())), natively)


def losses(shape: tuple[int, ...], natively: dict[str, str], **options: Any) -> Operation:
    """Cross-entropy with `options`."""
    return Operation(partial(F.cross_entropy, **options), (shape,), natively)


def attention(*shapes: tuple[int, ...], **options: Any) -> Operation:
    """Attention with `options`."""
    return Operation(partial(F.scaled_dot_product_attention, **options), shapes, {REVERSE: RAISES})


HEADS = (2, 4, 3, 5), (2, 4, 6, 5), (2, 4, 6, 5)
FEW = (2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 5)
MASK = constant(3, 6) > -0.5
PICTURES = (2, 4, 3, 3)
IN_PLACE, SILENT, MISSING = {REVERSE: RAISES}, {REVERSE: WRONG}, {FORWARD: RAISES}


def running() -> tuple[Tensor, Tensor]:
    """A running mean and variance."""
    return constant(4), 1 + positive(4)


COMPOSITE = {
    "softmax": Operation(lambda x: F.softmax(x, 1), natively=IN_PLACE),
    "softmax, method": Operation(lambda x: x.softmax(0), natively=IN_PLACE),
    "softmax, torch": Operation(lambda x: torch.softmax(x, dim=-1, dtype=torch.float64), natively=IN_PLACE),
    "softmin": Operation(lambda x: F.softmin(x, 1), natively=IN_PLACE),
    "gumbel_softmax": Operation(lambda x: F.gumbel_softmax(x, tau=0.7), natively=IN_PLACE),
    "log_softmax": Operation(lambda x: F.log_softmax(x, 0), natively=IN_PLACE),
    "log_softmax, torch": Operation(lambda x: torch.log_softmax(x, 1), natively=IN_PLACE),
    "log_softmax, method": Operation(lambda x: x.log_softmax(1), natively=IN_PLACE),
    "logsumexp": Operation(lambda x: x.logsumexp(1), natively=IN_PLACE),
    "logsumexp, two axes": Operation(lambda x: torch.logsumexp(x, (0, 2), True), ((2, 3, 4),), IN_PLACE),
    "cross_entropy": losses((3, 5), IN_PLACE, target=labels(3)),
    "cross_entropy, one example": losses((5,), IN_PLACE, target=labels()),
    "cross_entropy, sum": losses((3, 5), IN_PLACE, target=labels(3), reduction="sum"),
    "cross_entropy, pictures": losses((2, 5, 3, 4), IN_PLACE, target=labels(2, 3, 4), reduction="none"),
    "cross_entropy, ignored": losses((4, 5), IN_PLACE, target=labels(4, ignored=2)),
    "cross_entropy, ignore_index": losses((4, 5), IN_PLACE, target=labels(4), ignore_index=int(labels(4)[1])),
    "cross_entropy, weight": losses((4, 5), IN_PLACE, target=labels(4, ignored=1), weight=positive(5)),
    "cross_entropy, smoothing": losses((4, 5), IN_PLACE, target=labels(4, ignored=1), label_smoothing=0.1),
    "cross_entropy, smoothing and weight": losses(
        (4, 5), IN_PLACE, target=labels(4, ignored=1), weight=positive(5), label_smoothing=0.1
    ),
    "cross_entropy, all but a mean": losses(
        (2, 5, 3), IN_PLACE, target=labels(2, 3, ignored=1), weight=positive(5), label_smoothing=0.1, reduction="none"
    ),
    "cross_entropy, probabilities": losses((3, 5), IN_PLACE, target=constant(3, 5).softmax(1)),
    "cross_entropy, both differentiated": Operation(
        lambda x, y: F.cross_entropy(x, y.sigmoid(), weight=positive(5), label_smoothing=0.2),
        ((2, 5, 3), (2, 5, 3)),
        IN_PLACE,
    ),
    "layer_norm": Operation(lambda x, w, b: F.layer_norm(x, (5,), w, b), ((3, 5), (5,), (5,)), SILENT),
    "layer_norm, two axes": Operation(lambda x, w: torch.layer_norm(x, (3, 4), w), ((2, 3, 4), (3, 4)), SILENT),
    "group_norm": Operation(lambda x, w, b: F.group_norm(x, 2, w, b), (PICTURES, (4,), (4,)), MISSING),
    "batch_norm": Operation(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (PICTURES, (4,), (4,)), SILENT
    ),
    "batch_norm, vectors": Operation(
        lambda x, w, b: F.batch_norm(x, *running(), w, b, training=True), ((6, 4), (4,), (4,)), SILENT
    ),
    "instance_norm": Operation(lambda x, w, b: F.instance_norm(x, *running(), w, b), (PICTURES, (4,), (4,)), SILENT),
    "norm, p=1": Operation(lambda x: x.norm(1, dim=1), natively=IN_PLACE),
    "normalize, p=1": Operation(lambda x: F.normalize(x, p=1, dim=1), natively=IN_PLACE),
    "glu": Operation(F.glu, ((3, 6),), IN_PLACE),
    "silu": Operation(F.silu, natively=MISSING),
    "silu, in place": Operation(lambda x: F.silu(x * 1, inplace=True), natively=MISSING),
    "mish": Operation(F.mish, natively=MISSING),
    "mish, in place": Operation(lambda x: F.mish(x * 1, inplace=True), natively=MISSING),
    "logit": Operation(lambda x: torch.logit(x.sigmoid(), 1e-6), natively=MISSING),
    "mse_loss": Operation(lambda x: F.mse_loss(x, constant(3, 5)), natively=MISSING),
    "huber_loss": Operation(lambda x: F.huber_loss(x, constant(3, 5), delta=0.8), natively=MISSING),
    "huber_loss, weight": Operation(
        lambda x: F.huber_loss(x, constant(3, 5), "none", weight=positive(3, 5)), natively=MISSING
    ),
    "soft_margin_loss": Operation(lambda x: F.soft_margin_loss(x, constant(3, 5).sign()), natively=MISSING),
    "embedding, a row of padding": Operation(
        lambda w: F.embedding(labels(3, 2), w, padding_idx=int(labels(3, 2)[0, 0])),
        ((5, 4),),
        {FORWARD: WRONG, REVERSE: WRONG},
    ),
    "weight_norm": module(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), (3, 4), **{FORWARD: RAISES, REVERSE: RAISES}
    ),
    "attention": attention(*HEADS),
    "attention, scale": attention(*HEADS, scale=0.3),
    "attention, causal": attention(*HEADS, is_causal=True),
    "attention, mask": attention(*HEADS, attn_mask=MASK),
    "attention, a row of masks": attention(*HEADS, attn_mask=MASK & (torch.arange(3) > 0)[:, None]),
    "attention, bias": attention(*HEADS, (3, 6)),
    "attention, dropout": attention(*HEADS, dropout_p=0.3),
    "attention, grouped heads": attention(*FEW, enable_gqa=True),
    "MultiheadAttention": module(
        lambda: nn.MultiheadAttention(4, 2, dropout=0.1), *[(3, 2, 4)] * 3, **{REVERSE: RAISES}
    ),
    "TransformerEncoderLayer": module(
        lambda: nn.TransformerEncoderLayer(4, 2, 6, activation=F.gelu), (3, 2, 4), **{REVERSE: RAISES}
    ),
}
if hasattr(F, "linear_cross_entropy"):  # From torch 2.13 on.
    COMPOSITE["linear_cross_entropy"] = Operation(
        lambda x, w: F.linear_cross_entropy(x, w, labels(3)), ((3, 4), (5, 4)), natively=IN_PLACE
    )

ACTIVATIONS = (
    "relu relu6 elu selu celu leaky_relu softplus hardswish hardtanh tanhshrink softsign logsigmoid hardshrink "
    "softshrink tanh sigmoid rrelu dropout alpha_dropout feature_alpha_dropout gelu"
)
REGRESSIONS = "l1_loss smooth_l1_loss poisson_nll_loss hinge_embedding_loss"

SHUFFLED = torch.tensor([[1, 3, 0, 2, 4], [4, 2, 1, 0, 3], [0, 1, 2, 3, 4]])
NATIVE = {
    **{name: Operation(getattr(F, name)) for name in ACTIVATIONS.split()},
    **{name: Operation(partial(getattr(F, name), target=positive(3, 5))) for name in REGRESSIONS.split()},
    "gelu, tanh": Operation(lambda x: F.gelu(x, approximate="tanh")),
    "prelu": Operation(F.prelu, ((3, 5), (5,))),
    "threshold": Operation(lambda x: F.threshold(x, 0.1, 0.5)),
    "dropout1d": Operation(F.dropout1d, ((2, 4, 3),)),
    "dropout2d": Operation(F.dropout2d, (PICTURES,)),
    "linear": Operation(F.linear, ((2, 3, 5), (4, 5), (4,))),
    "linear, one row": Operation(F.linear, ((5,), (4, 5))),
    "bilinear": Operation(F.bilinear, ((3, 4), (3, 5), (2, 4, 5), (2,))),
    "addmm": Operation(torch.addmm, ((4,), (3, 5), (5, 4))),
    "addmm, matrix": Operation(torch.addmm, ((3, 4), (3, 5), (5, 4))),
    "addmm, scaled": Operation(partial(torch.addmm, beta=2.0, alpha=0.5), ((3, 4), (3, 5), (5, 4))),
    "matmul": Operation(torch.matmul, ((2, 3, 5), (5, 4))),
    "matmul, batches": Operation(lambda x, y: x @ y, ((2, 3, 5), (2, 5, 4))),
    "matmul, vectors": Operation(torch.matmul, ((5,), (5,))),
    "matmul, constant": Operation(lambda x: constant(4, 3) @ x @ constant(5, 2)),
    "bmm": Operation(torch.bmm, ((2, 3, 5), (2, 5, 4))),
    "einsum": Operation(lambda x, y: torch.einsum("bij,bjk->bi", x, y), ((2, 3, 5), (2, 5, 4))),
    "arithmetic": Operation(
        lambda x, y: (2 - x * 3 + 1) / 4 * y - x / (y * y + 1) + (1 - y) * constant(5), ((3, 5), (5,))
    ),
    "sums": Operation(
        lambda x, y: torch.add(x, y, alpha=2) + torch.sub(x, constant(5)) - (x - 1) + (y - x), ((3, 5), (5,))
    ),
    "powers": Operation(lambda x: 1 / (x**2 + 1) + 2**x + x**3.0),
    "conv1d": Operation(partial(F.conv1d, padding=1), ((2, 3, 7), (4, 3, 3), (4,))),
    "conv2d": Operation(partial(F.conv2d, stride=2, groups=2), ((2, 4, 5, 5), (4, 2, 3, 3), (4,))),
    "conv3d": Operation(F.conv3d, ((1, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,))),
    "conv_transpose1d": Operation(F.conv_transpose1d, ((2, 3, 4), (3, 2, 3), (2,))),
    "conv_transpose2d": Operation(partial(F.conv_transpose2d, stride=2), ((2, 3, 3, 3), (3, 2, 2, 2), (2,))),
    "unfold": Operation(lambda x: F.fold(F.unfold(x, 2) ** 2, (3, 3), 2), (PICTURES,)),
    "avg_pool2d": Operation(lambda x: F.avg_pool2d(x, 2), ((2, 4, 4, 4),)),
    "max_pool2d": Operation(lambda x: F.max_pool2d(x, 2), ((2, 4, 4, 4),)),
    "max_pool1d": Operation(lambda x: F.max_pool1d(x, 2), ((2, 4, 6),)),
    "lp_pool1d": Operation(lambda x: F.lp_pool1d(x.exp(), 2, 2), ((2, 4, 6),)),
    "adaptive_avg_pool2d": Operation(lambda x: F.adaptive_avg_pool2d(x, 2), ((2, 4, 5, 5),)),
    "adaptive_max_pool2d": Operation(lambda x: F.adaptive_max_pool2d(x, 2), ((2, 4, 5, 5),)),
    "interpolate, bilinear": Operation(
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), (PICTURES,)
    ),
    "interpolate, bicubic": Operation(lambda x: F.interpolate(x, size=5, mode="bicubic"), (PICTURES,)),
    "interpolate, nearest": Operation(lambda x: F.interpolate(x, scale_factor=2), (PICTURES,)),
    "pixel_shuffle": Operation(lambda x: F.pixel_shuffle(x, 2), (PICTURES,)),
    "pad": Operation(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), (PICTURES,)),
    "embedding": Operation(lambda w: F.embedding(labels(3, 2), w), ((5, 4),)),
    "rms_norm": Operation(lambda x, w: F.rms_norm(x, (5,), w), ((3, 5), (5,))),
    "batch_norm, evaluated": Operation(lambda x, w, b: F.batch_norm(x, *running(), w, b), (PICTURES, (4,), (4,))),
    "instance_norm, evaluated": Operation(
        lambda x, w, b: F.instance_norm(x, *running(), w, b, use_input_stats=False), (PICTURES, (4,), (4,))
    ),
    "local_response_norm": Operation(lambda x: F.local_response_norm(x, 2), (PICTURES,)),
    "normalize": Operation(lambda x: F.normalize(x, dim=1)),
    "norm": Operation(lambda x: torch.linalg.vector_norm(x, dim=1) + x.norm(3, dim=1)),
    "variance": Operation(lambda x: x.var(1) + x.std(1) + torch.var_mean(x, 1)[1]),
    "cosine_similarity": Operation(F.cosine_similarity, ((3, 5), (3, 5))),
    "pairwise_distance": Operation(F.pairwise_distance, ((3, 5), (3, 5))),
    "kl_div": Operation(lambda x: F.kl_div(x, positive(3, 5), reduction="batchmean")),
    "nll_loss": Operation(lambda x: F.nll_loss(x.exp(), labels(3), weight=positive(5))),
    "binary_cross_entropy": Operation(lambda x: F.binary_cross_entropy(x.sigmoid(), positive(3, 5))),
    "with_logits": Operation(
        lambda x: F.binary_cross_entropy_with_logits(x, positive(3, 5), pos_weight=1 + positive(5))
    ),
    "gaussian_nll_loss": Operation(lambda x, y: F.gaussian_nll_loss(x, constant(3, 5), y.exp()), ((3, 5), (3, 5))),
    "multilabel_soft_margin_loss": Operation(lambda x: F.multilabel_soft_margin_loss(x, (constant(3, 5) > 0).double())),
    "cosine_embedding_loss": Operation(
        lambda x, y: F.cosine_embedding_loss(x, y, constant(3).sign()), ((3, 5), (3, 5))
    ),
    "margin_ranking_loss": Operation(lambda x, y: F.margin_ranking_loss(x, y, constant(5).sign(), 0.3), ((5,), (5,))),
    "triplet_margin_loss": Operation(F.triplet_margin_loss, ((3, 5),) * 3),
    "indexing": Operation(lambda x: x[labels(3) % 3, 1:].cumsum(1) * x.sort(1).values[:, :4]),
    "scatter": Operation(lambda x: torch.zeros(5, 5).index_add(0, labels(3), x) ** 2),
    "where": Operation(lambda x: torch.where(x > 0, x.exp(), x.sin()).clamp(-0.5, 2).masked_fill(x > 1, 0.3)),
    **{
        name: Operation(getattr(torch, name))
        for name in "cos tan sinh cosh asinh atan erf expm1 abs square neg exp2 sign floor".split()
    },
    **{
        name: Operation(lambda x, name=name: getattr(torch, name)(x.exp()))
        for name in "log log2 log10 log1p rsqrt reciprocal lgamma digamma".split()
    },
    **{
        name: Operation(lambda x, name=name: getattr(torch, name)(0.9 * x.tanh())) for name in ["asin", "acos", "atanh"]
    },
    **{
        name: Operation(getattr(torch, name), ((3, 5), (3, 5)))
        for name in "maximum minimum fmax fmin logaddexp atan2 hypot dist".split()
    },
    **{
        f"{name} of rows": Operation(lambda x, name=name: getattr(x, name)(1)[0])
        for name in ["max", "min", "median", "mode"]
    },
    **{
        f"{name} of rows": Operation(lambda x, name=name: getattr(x, name)(1))
        for name in "amax amin prod cumprod sum mean".split()
    },
    **{
        f"{name} of all": Operation(lambda x, name=name: getattr(x, name)())
        for name in "max min sum mean prod tril triu".split()
    },
    "shapes": Operation(lambda x: torch.cat([x.flip(0), x.roll(1, 0)]).T.reshape(5, 2, 3).movedim(0, 1).contiguous()),
    "aliases": Operation(
        lambda x: torch.ops.aten.mul.Scalar(x.view(15).unflatten(0, (3, 5)), 2.0) * torch.ops.aten.alias(x)
    ),
    "views": Operation(lambda x: x.narrow(1, 0, 3).diagonal() * x.unfold(1, 3, 2)[:, 0].sum(0) + x.diag()),
    "gather": Operation(lambda x: x.gather(1, labels(3, 5)) + x.index_select(1, labels(5)) + x.take(labels(3, 5))),
    "scatter, rows": Operation(lambda x: x.scatter_add(1, labels(3, 5), x.sin()) + x.scatter(1, SHUFFLED, x.cos())),
    "copies": Operation(lambda x: x.index_copy(0, torch.tensor([2, 0, 1]), x.exp()).masked_select(constant(3, 5) > 0)),
    "outer": Operation(torch.outer, ((3,), (4,))),
    "baddbmm": Operation(torch.baddbmm, ((2, 3, 4), (2, 3, 5), (2, 5, 4))),
    "addcmul": Operation(lambda x, y, z: torch.addcmul(x, y, z, value=0.5), ((3, 5),) * 3),
    "lerp": Operation(lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(x, y, x), ((3, 5), (3, 5))),
    "mv": Operation(torch.mv, ((3, 5), (5,))),
    "power of tensors": Operation(lambda x, y: x.exp() ** y, ((3, 5), (3, 5))),
    "division": Operation(lambda x, y: x / (2 + y.cos()) + x.remainder(1.5), ((3, 5), (3, 5))),
    "numbers": Operation(lambda x: 2 - x + 3 * x / 4 - (1 - x) + x.clamp(max=0.5) + x.clamp(min=-0.5) + x.nan_to_num()),
    "RNN": module(lambda: nn.RNN(3, 4), (5, 2, 3)),
    "LSTM": module(lambda: nn.LSTM(3, 4), (5, 2, 3)),
    "GRU": module(lambda: nn.GRU(3, 4), (5, 2, 3)),
}
