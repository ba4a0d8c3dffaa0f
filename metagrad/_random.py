"""The random numbers of a training step: generator states as tensors, so that a replay draws the same."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from metagrad._types import Params


def seeded(seed: int, params: Params) -> tuple[Tensor, ...]:
    """The states of torch's own generators after `torch.manual_seed(seed)`: the CPU's, then each used device's."""
    devices = cuda_devices(params.values())
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return generator_states(devices)


@contextmanager
def drawing(rng: tuple[Tensor, ...], params: Params) -> Iterator[list[tuple[Tensor, ...]]]:
    """Draw from the generator states `rng` inside, and leave the caller's as they were; yields [the states after]."""
    devices = cuda_devices(params.values())
    after: list[tuple[Tensor, ...]] = []
    with torch.random.fork_rng(devices):
        set_generators(rng, devices)
        yield after
        after.append(generator_states(devices))


def cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    """The CUDA devices that hold `tensors`; the CPU always draws too."""
    return sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})


def generator_states(devices: list[int]) -> tuple[Tensor, ...]:
    """The states of torch's own generators: the CPU's, then those of the CUDA `devices`."""
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices))


def set_generators(states: tuple[Tensor, ...], devices: list[int]) -> None:
    """The inverse of `generator_states`."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)
