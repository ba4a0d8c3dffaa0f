"""Where kept states live between the forward run and their reversal."""

from abc import ABC, abstractmethod

from metagrad._tree import num_bytes
from metagrad._types import State


class Store(ABC):
    """A place for states, filled and emptied by the replay."""

    @abstractmethod
    def put(self, state: State) -> None:
        """Keep `state` under its step."""

    @abstractmethod
    def get(self, step: int) -> State:
        """The state kept under `step`."""

    @abstractmethod
    def drop(self, step: int) -> None:
        """Forget the state kept under `step`."""

    @property
    @abstractmethod
    def peak_bytes(self) -> tuple[int, int]:
        """The largest number of bytes held at a time, in RAM and on disk."""


class RamStore(Store):
    """States kept as they are, on the device they were computed on: steps are pure, so nothing is copied."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        self._peak = 0

    def put(self, state: State) -> None:
        self._states[state.step] = state
        self._peak = max(self._peak, num_bytes(list(self._states.values())))

    def get(self, step: int) -> State:
        return self._states[step]

    def drop(self, step: int) -> None:
        del self._states[step]

    @property
    def peak_bytes(self) -> tuple[int, int]:
        return self._peak, 0
