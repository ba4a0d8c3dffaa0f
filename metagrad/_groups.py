"""Parameter groups: another optimizer, or other hyperparameters, for each kind of parameter."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from metagrad._adapter import adapt
from metagrad._transformation import Divided, Given, Made, Transformation
from metagrad._tree import add
from metagrad._types import Params, Tree

Labelling: TypeAlias = Callable[[str, Tensor], str]


def groups(rule: Labelling, transformations: Mapping[str, GradientTransformation]) -> Transformation:
    """Each parameter updated by the transformation of its group: the parameter groups of `torch.optim`.

    Args:
        rule: from a parameter's name and its tensor to the label of its group. It decides by name, shape and type:
            it is asked again at every step, then with the gradient in place of the parameter.
        transformations: one for each label. A label that the rule never gives is allowed.

    Raises:
        ValueError: at `init`, for parameters that are not a dict by name, or a label without a transformation.

    >>> import metagrad as mg, torch
    >>> decayed, plain = mg.optim.adamw(1e-3, weight_decay=0.1), mg.optim.adamw(1e-3)
    >>> rule = lambda name, tensor: "matrix" if tensor.ndim == 2 else "vector"
    >>> optimizer = mg.optim.groups(rule, {"matrix": decayed, "vector": plain})
    >>> sorted(optimizer.init({"w": torch.ones(2, 2), "b": torch.ones(2)}))
    ['matrix', 'vector']
    """
    members = {label: adapt(transformation) for label, transformation in transformations.items()}

    def part(tree: Params) -> dict[str, Params]:
        if not isinstance(tree, dict):
            raise ValueError(f"groups are made by name, but the parameters are a {type(tree).__name__}. Pass a dict.")
        parts: dict[str, Params] = {}
        for name, tensor in tree.items():
            label = rule(name, tensor)
            if label not in members:
                raise ValueError(
                    f"the rule puts parameter {name!r} into group {label!r}, but there are transformations only for "
                    f"{', '.join(map(repr, members)) or 'no group'}. Add one for {label!r}, or change the rule."
                )
            parts.setdefault(label, {})[name] = tensor
        return parts

    def init(params: Params) -> dict[str, Tree]:
        return {label: members[label].init(own) for label, own in part(params).items()}

    def update(
        updates: Params, state: dict[str, Tree], *, params: Params | None = None, inplace: bool = False
    ) -> tuple[Params, dict[str, Tree]]:
        results: Params = {}
        new: dict[str, Tree] = {}
        for label, own in part(updates).items():
            of_group = None if params is None else {name: params[name] for name in own}
            changes, new[label] = members[label].update(own, state[label], params=of_group, inplace=False)
            results.update(changes)
        return {name: results[name] for name in updates}, new

    def apply(gradient: Params, state: dict[str, Tree], params: Params) -> Made:
        results: Params = {}
        new: dict[str, Tree] = {}
        for label, own in part(gradient).items():
            changed, new[label] = members[label].apply(own, state[label], {name: params[name] for name in own})
            results.update(changed)
        return Made({name: results[name] for name in params}, new)

    def pull(given: Given, cotangent: Made, meta: Sequence[Tensor], wrt_state: bool) -> tuple[Given, list[Tensor]]:
        to_gradient: Params = {}
        to_params: Params = {}
        states: dict[str, Tree] = {}
        to_meta = [torch.zeros_like(leaf) for leaf in meta]
        for label, own in part(given.gradient).items():
            params, end = ({name: tree[name] for name in own} for tree in (given.params, cotangent.params))
            back, more = members[label].pull(
                Given(own, given.state[label], params), Made(end, cotangent.state[label]), meta, wrt_state
            )
            to_gradient.update(back.gradient)
            to_params.update(back.params or {})
            states[label], to_meta = back.state, add(to_meta, more)
        return Given(to_gradient, *((states, to_params) if wrt_state else (None, None))), to_meta

    def on_rows(divided: Divided) -> Transformation:
        # The rule is asked about whole parameters: of rows the shape is another.
        def of_whole(name: str, tensor: Tensor) -> str:
            return rule(name, divided.whole[name])

        parts = [member.on_rows for member in members.values()]
        return groups(of_whole, dict(zip(members, (part(divided) for part in parts if part), strict=True)))

    return Transformation(
        init,
        update,
        apply,
        pull,
        lambda: groups(rule, {label: member.compiled() for label, member in members.items()}),
        on_rows if all(member.on_rows for member in members.values()) else None,
    )
