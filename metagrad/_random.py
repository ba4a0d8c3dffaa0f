"""The random numbers of a training step: generator states as tensors, so that a replay draws the same."""

import torch
from torch import Tensor

from metagrad._types import Params


def cuda_devices(params: Params) -> list[int]:
    """The CUDA devices that hold parameters; the CPU always draws too."""
    return sorted({p.device.index for p in params.values() if p.device.type == "cuda"})


def read_rng(devices: list[int]) -> tuple[Tensor, ...]:
    """The state of torch's own generators: the CPU's, then each device's."""
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices))


def write_rng(states: tuple[Tensor, ...], devices: list[int]) -> None:
    """Put the generators in the state that `read_rng` returned."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)
