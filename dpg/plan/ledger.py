"""How many bytes of tensors are alive: counted operation by operation, also for tensors without content."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Inside `with`, the bytes of all tensors that operations make and that something still holds.

    On torch's meta device an operation makes shapes alone, so that the memory of a step of any size is counted without
    having it. Not counted is what a kernel takes for itself and gives back before it returns.

    Args:
        known: tensors from before, which are not counted where an operation returns a view of them.

    Attributes:
        alive: bytes now.
        peak: the most bytes so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        # By the address of the storage; a weak reference says when it is gone.
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # A model that asks whether all tokens are real is told no: with padding attention takes the most.
            return False
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self._seen[key] = weakref.ref(storage, self._forget(key, size))

    def _forget(self, key: int, size: int) -> Any:
        def gone(reference: Any) -> None:
            del self._seen[key]
            self.alive -= size

        return gone
