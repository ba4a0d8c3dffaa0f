"""The operations that forward mode may be trusted with: those that tests/operations.py has, and proves in every mode.

By the names of autograd's nodes, as they are met in forward-over-reverse and reverse-over-forward with composites. What
torch gets wrong there has no name here; nor has any function of a user's, whose names end without a number.
"""

from torch import Tensor

from metagrad._jets import Affine
from metagrad._refusals import graph_of
from metagrad._smooth import Pair, Pull, Value

COVERED = frozenset(
    """
    AbsBackward0 AcosBackward0 AdaptiveAvgPool2DBackward0 AdaptiveMaxPool2DBackward0 AddBackward0 AddBackward1
    AddcmulBackward0 AddmmBackward0 AliasBackward0 AmaxBackward0 AminBackward0 AsStridedBackward0 AsinBackward0
    AsinhBackward0 Atan2Backward0 AtanBackward0 AtanhBackward0 AvgPool2DBackward0 AvgPool3DBackward0
    BaddbmmBackward0 BinaryCrossEntropyBackward0 BinaryCrossEntropyBackwardBackward0
    BinaryCrossEntropyWithLogitsBackward0 BmmBackward0 CatBackward0 CeluBackward0 ClampBackward1
    ClampMinBackward0 CloneBackward0 Col2ImBackward0 ConstantPadNdBackward0 ConvolutionBackward0 CosBackward0
    CoshBackward0 CumprodBackward0 CumsumBackward0 DiagonalBackward0 DiagonalBackward0_copy DigammaBackward0
    DistBackward0 DivBackward0 DotBackward0 EluBackward0 EluBackwardBackward0 EmbeddingBackward0 ErfBackward0
    Exp2Backward0 ExpBackward0 ExpandBackward0 Expm1Backward0 FlipBackward0 FloorBackward0 FmaxBackward0
    FminBackward0 GatherBackward0 HardshrinkBackward0 HardshrinkBackwardBackward0 HardswishBackward0
    HardswishBackwardBackward0 HardtanhBackward0 HardtanhBackwardBackward0 HypotBackward0 Im2ColBackward0
    IndexAddBackward0 IndexBackward0 IndexCopyBackward0 IndexSelectBackward0 LeakyReluBackward0
    LeakyReluBackwardBackward0 LerpBackward0 LerpBackward1 LgammaBackward0 LinalgVectorNormBackward0
    Log10Backward0 Log1PBackward0 Log2Backward0 LogBackward0 LogSigmoidBackward0 LogSigmoidBackwardBackward0
    LogaddexpBackward0 LogitBackward0 MaskedFillBackward0 MaskedSelectBackward0 MaxBackward0 MaxBackward1
    MaxPool2DWithIndicesBackward0 MaximumBackward0 MeanBackward0 MeanBackward1 MedianBackward1 MinBackward0
    MinBackward1 MinimumBackward0 MmBackward0 ModeBackward0 MulBackward0 MulBackward1 MvBackward0
    NanToNumBackward0 NegBackward0 NllLossBackward0 NormBackward1 PermuteBackward0 PixelShuffleBackward0
    PolygammaBackward0 PowBackward0 PowBackward1 PowBackward2 PreluKernelBackward0 ProdBackward0 ProdBackward1
    ReciprocalBackward0 ReflectionPad2DBackward0 ReluBackward0 RemainderBackward0 RepeatBackward0
    ReshapeAliasBackward0 RollBackward0 RreluWithNoiseBackward0 RreluWithNoiseBackwardBackward0 RsqrtBackward0
    RsubBackward1 ScatterAddBackward0 ScatterBackward0 SelectBackward0 SgnBackward0 SigmoidBackward0
    SigmoidBackwardBackward0 SignBackward0 SinBackward0 SinhBackward0 SliceBackward0 SmoothL1LossBackward0
    SmoothL1LossBackwardBackward0 SoftplusBackward0 SoftplusBackwardBackward0 SoftshrinkBackward0
    SoftshrinkBackwardBackward0 SortBackward0 SplitBackward0 SqrtBackward0 SqueezeBackward1 SqueezeBackward2
    SqueezeBackward4 StackBackward0 StdBackward0 SubBackward0 SubBackward1 SumBackward0 SumBackward1 TBackward0
    TakeBackward0 TanBackward0 TanhBackward0 TanhBackwardBackward0 ThresholdBackward0 ThresholdBackwardBackward0
    TransposeBackward0 TrilBackward0 TrilinearBackward0 TriuBackward0 UnbindBackward0 UnfoldBackward0
    UnsafeSplitBackward0 UnsafeViewBackward0 UnsqueezeBackward0 UpsampleBicubic2DBackward0
    UpsampleBilinear2DBackward0 UpsampleNearest2DBackward0 VarBackward0 VarMeanBackward0 ViewBackward0
    WhereBackward0
    torch::autograd::AccumulateGrad torch::autograd::CopyBackwards torch::autograd::CopySlices torch::autograd::Identity
    ToCopyBackward0
    """.split()
)
OURS = {function._backward_cls for function in (Affine, Pair, Pull, Value)}


class UncoveredError(Exception):
    """A loss uses an operation that forward mode is not trusted with; the message is its name."""


def refuse_uncovered(loss: Tensor) -> None:
    """Raise if `loss` was computed by an operation that is not covered.

    Cost: a look at each node of its graph.
    """
    nodes = [node for node in graph_of([loss]) if node.name() not in COVERED]
    if uncovered := sorted({node.name() for node in nodes if type(node) not in OURS}):
        raise UncoveredError(", ".join(uncovered))
