"""Where kept states live between the forward run and their reversal."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from metagrad._tree import map_tensors, num_bytes, tensor_leaves
from metagrad._types import State, Tree


class Kept(NamedTuple):
    """A state, and what its step found worth keeping for its pullback (None: nothing)."""

    state: State
    extra: Tree


class Bytes(NamedTuple):
    """Bytes in RAM (on a GPU: in the memory of the device that holds them) and on disk."""

    ram: int
    disk: int


class Store(ABC):
    """A place for states, filled and emptied by the replay."""

    @abstractmethod
    def put(self, kept: Kept) -> None:
        """Keep a state under its step."""

    @abstractmethod
    def get(self, step: int) -> Kept:
        """What is kept under `step`."""

    @abstractmethod
    def drop(self, step: int) -> None:
        """Forget what is kept under `step`."""

    @property
    @abstractmethod
    def peak_bytes(self) -> Bytes:
        """The most bytes held at a time."""

    def expect(self, step: int) -> None:  # noqa: B027  # not abstract: only slow stores have something to fetch
        """Prepare for `get(step)`, which comes next."""

    def close(self) -> None:  # noqa: B027  # not abstract: only stores that work in the background have something to end
        """Finish what is under way."""


def refuse_second(step: int, kept: Collection[int]) -> None:
    """Raise if a state of this step is kept already, by a run that is not walked back yet or was cut off."""
    if step in kept:
        raise ValueError(
            f"the store already keeps a state of step {step}, of another run that is not finished. Give every run a "
            "store of its own."
        )


class RamStore(Store):
    """States kept as they are, on the device they were computed on: steps are pure, so nothing is copied."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        self._bytes = self._peak = 0

    def put(self, kept: Kept) -> None:
        refuse_second(kept.state.step, self._kept)
        self._peak = self._peak if self._kept else 0  # A store may serve one run after another.
        self._kept[kept.state.step] = kept
        self._bytes += num_bytes(kept)
        self._peak = max(self._peak, self._bytes)

    def get(self, step: int) -> Kept:
        return self._kept[step]

    def drop(self, step: int) -> None:
        self._bytes -= num_bytes(self._kept.pop(step))

    @property
    def peak_bytes(self) -> Bytes:
        return Bytes(self._peak, 0)


class PinnedStore(Store):
    """States of a GPU kept in the pinned memory of its host, copied on a stream of their own beside the computation.

    Raises:
        ValueError: where there is no CUDA device; use `RamStore` there.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("`PinnedStore` keeps the states of a GPU, but torch finds no CUDA device. Use RamStore().")
        self._host = RamStore()
        self._devices: dict[int, list[torch.device]] = {}
        self._coming: dict[int, Kept] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, kept: Kept) -> None:
        devices: list[torch.device] = []

        def to_host(leaf: Tensor) -> Tensor:
            devices.append(leaf.device)
            if leaf.device.type == "cpu":
                return leaf
            host = torch.empty_like(leaf, device="cpu", pin_memory=True)
            stream = self._after_current(leaf.device)
            with torch.cuda.stream(stream):
                host.copy_(leaf, non_blocking=True)
            leaf.record_stream(stream)  # Its memory is not used again before it has been copied.
            return host

        self._host.put(map_tensors(to_host, kept))
        self._devices[kept.state.step] = devices

    def expect(self, step: int) -> None:
        """Begin to copy a state back."""
        devices = iter(self._devices[step])

        def to_device(leaf: Tensor) -> Tensor:
            device = next(devices)
            if device.type == "cpu":
                return leaf
            # On the stream that wrote it, and so after that.
            with torch.cuda.stream(self._after_current(device)):
                return leaf.to(device, non_blocking=True)

        self._coming[step] = map_tensors(to_device, self._host.get(step))

    def get(self, step: int) -> Kept:
        if step not in self._coming:
            self.expect(step)
        kept = self._coming.pop(step)
        for leaf in tensor_leaves(kept):
            if leaf.device.type == "cuda":
                current = torch.cuda.current_stream(leaf.device)
                current.wait_stream(self._streams[leaf.device])
                leaf.record_stream(current)  # It was made on the other stream, and is used on this one.
        return kept

    def drop(self, step: int) -> None:
        self._host.drop(step)
        self._coming.pop(step, None)
        del self._devices[step]

    def _after_current(self, device: torch.device) -> torch.cuda.Stream:
        """The device's stream of copies, which goes on when everything is done that was asked for so far."""
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    @property
    def peak_bytes(self) -> Bytes:
        return self._host.peak_bytes


class TieredStore(Store):
    """Two stores under one schedule: the states of `disk_steps` in the second, all others in the first."""

    def __init__(self, fast: Store, slow: Store, disk_steps: Collection[int]) -> None:
        self.fast, self.slow, self.disk_steps = fast, slow, frozenset(disk_steps)

    def put(self, kept: Kept) -> None:
        self._of(kept.state.step).put(kept)

    def get(self, step: int) -> Kept:
        return self._of(step).get(step)

    def drop(self, step: int) -> None:
        self._of(step).drop(step)

    def expect(self, step: int) -> None:
        self._of(step).expect(step)

    def close(self) -> None:
        self.fast.close()
        self.slow.close()

    @property
    def peak_bytes(self) -> Bytes:
        fast, slow = self.fast.peak_bytes, self.slow.peak_bytes
        return Bytes(fast.ram + slow.ram, fast.disk + slow.disk)

    def _of(self, step: int) -> Store:
        return self.slow if step in self.disk_steps else self.fast
