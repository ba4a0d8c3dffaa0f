"""What a target model should become: differentiable scalars Φ of its trained parameters, higher is better."""

from dpg.metrics.held_out import HeldOutLoss
from dpg.metrics.metric import Bound, Params, ParamsMetric, TargetMetric, bind, head, head_name
from dpg.metrics.norm import WeightNorm
from dpg.metrics.pattern import WeightPattern, pixel_accuracy

__all__ = [
    "Bound",
    "HeldOutLoss",
    "Params",
    "ParamsMetric",
    "TargetMetric",
    "WeightNorm",
    "WeightPattern",
    "bind",
    "head",
    "head_name",
    "pixel_accuracy",
]
