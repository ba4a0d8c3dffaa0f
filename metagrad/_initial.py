"""What a user passes as the parameters of a run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from metagrad._refusals import refuse_shared_modules
from metagrad._tree import describe
from metagrad._types import State


def trainable(params: Mapping[str, Tensor] | torch.nn.Module | State) -> State:
    """What of `params` is trained, by name in order, and what is carried along; nothing is copied.

    Raises:
        ValueError: if there is nothing to train, or something that cannot be.
    """
    given = State({})
    if isinstance(params, State):
        given, params = params._replace(buffers=dict(params.buffers)), params.params
    elif isinstance(params, torch.nn.Module):
        refuse_shared_modules(params)
        given = State({}, dict(params.named_buffers()))
        params = {name: p for name, p in params.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("there are no parameters to train: pass a non-empty dict, or a module that is not frozen.")
    for name, value in params.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is {describe(value)}, but only floating-point tensors can be trained. "
                "Leave it out of `params`."
            )
    return given._replace(params={name: params[name] for name in sorted(params)})
