"""Arithmetic that is too coarse for a metagradient, refused unless asked for."""

from typing import Any

import torch

from metagrad._types import State

COARSE = (torch.float16, torch.bfloat16)


def refuse_low_precision(state: State, allowed: bool) -> None:
    """Raise for parameters in half precision, and for float32 products that torch may compute in TF32 or bfloat16.

    Raises:
        ValueError: naming the parameter or the setting, and the switch.
    """
    if allowed:
        return
    why = (
        "A metagradient sums small differences over all steps, and such rounding can be larger than all of them "
        "(docs/stability.md). "
    )
    switch = ", or pass allow_low_precision=True."
    for name, value in state.params.items():
        if value.dtype in COARSE:
            raise ValueError(f"parameter {name!r} is {value.dtype}. {why}Convert the model by .float(){switch}")
    for setting, precision in _float32_products(state).items():
        if precision in ("tf32", "bf16"):
            raise ValueError(f"{setting} is {precision!r}. {why}Set it to 'ieee'{switch}")


def _float32_products(state: State) -> dict[str, str]:
    """The settings of torch that decide how this state's float32 products are computed."""
    backends: Any = torch.backends  # Its stubs do not know these settings.
    single = [value for value in state.params.values() if value.dtype == torch.float32]
    on_gpu = [value for value in single if value.device.type == "cuda"]
    settings = {}
    if any(value.device.type == "cpu" for value in single):
        settings["torch.backends.mkldnn.matmul.fp32_precision"] = backends.mkldnn.matmul.fp32_precision
    if on_gpu:
        settings["torch.backends.cuda.matmul.fp32_precision"] = backends.cuda.matmul.fp32_precision
    if any(value.ndim > 2 for value in on_gpu):  # Only convolutions have such kernels.
        settings["torch.backends.cudnn.conv.fp32_precision"] = backends.cudnn.conv.fp32_precision
    return settings
