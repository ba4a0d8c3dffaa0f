"""Training as a differentiable layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metagrad._gradient import DEFAULT_SCHEDULE, prepared
from metagrad._replay import Replay
from metagrad._schedule import Schedule
from metagrad._sharded import Sharded
from metagrad._store import Store
from metagrad._tree import detached, differentiable, floating_leaves, grouped, independent, with_floating_leaves
from metagrad._types import Batches, LinearStep, State, Step, Term, Tree


def train(
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    schedule: Schedule = DEFAULT_SCHEDULE,
    store: Store | None = None,
    progress: bool = False,
    allow_low_precision: bool = False,
) -> State:
    """Training as a differentiable layer: the trained state, whose tensors know how they came to be.

    Backward through `state.params`, `state.buffers` or `state.optimizer` replays the run in reverse and leaves exact
    gradients in every tensor of `meta` and of the initial state that requires one. The reverse pass runs once and
    cannot itself be differentiated. Evaluate normalisation layers by `state.buffers` in a `DifferentiableStatistics()`.

    Args, errors and cost: those of `metagradient`; the reverse part of the cost is paid in backward.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(lambda p, b, meta: (p["w"] - b) ** 2, lambda meta: mg.optim.sgd(lr=meta["lr"]))
        >>> meta = {"lr": torch.tensor(0.25, requires_grad=True)}
        >>> state = mg.train(step, {"w": torch.tensor(0.0)}, [torch.tensor([2.0])] * 2, meta)
        >>> state.params["w"].backward()
        >>> float(meta["lr"].grad)  # w = 2 - 2(1 - 2 lr)^2
        4.0
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"`schedule` is {schedule!r}. Pass a schedule such as mg.Binomial(slots=8); budgets are for metagradient."
        )
    if isinstance(step, Sharded):
        raise ValueError(
            "the tensors of a sharded state are divided among ranks, and a loss computed from them would be another on "
            "each. Pass the step without `Sharded`, or call mg.metagradient with the loss as its metric."
        )
    # Copied: the tensors of `meta` may be changed by an outer optimizer before backward replays the run.
    own, run = prepared(step, params, batches, independent(meta), True, progress, allow_low_precision)
    sources = _sources(step, params, own, run.initial)
    if not any(source is not None and source.requires_grad for source in sources):
        run = replace(run, wrt_params=False)
    layer = _Layer(replace(run, schedule=schedule).begin(store), run.initial)
    outputs = _Training.apply(layer, *sources, *floating_leaves(meta))  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    assert layer.final is not None
    parts = differentiable(layer.final)
    trained = grouped(outputs, [floating_leaves(part) for part in parts])
    tree, optimizer, buffers = (with_floating_leaves(*pair) for pair in zip(parts, trained, strict=True))
    return layer.final._replace(params=tree, optimizer=optimizer, buffers=buffers)


@dataclass
class _Layer:
    """What `_Training` carries from forward to backward besides tensors."""

    replay: Replay
    initial: State
    final: State | None = None


class _Training(torch.autograd.Function):
    """Initial state and metaparameters ↦ trained state."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, *leaves: Tensor | None) -> tuple[Tensor, ...]:
        final = layer.replay.forward(layer.initial)
        # Detached: the outputs will know this node, and the node must not know them, or neither is ever freed.
        layer.final = detached(final)
        ctx.layer, ctx.given = layer, [leaf is not None for leaf in leaves]
        return tuple(floating_leaves(differentiable(final)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        layer: _Layer = ctx.layer
        assert layer.final is not None

        def terms(state: State) -> list[Term | None]:
            last = state.step == len(layer.replay.batches)
            return [Term(cotangent[0].new_zeros(()), list(cotangent)) if last else None]

        done = layer.replay.reverse(layer.final, terms)
        layer.replay.store.close()
        num_initial = len(floating_leaves(differentiable(layer.initial)))
        initial = done.carried[0] if done.carried is not None else [None] * num_initial
        pairs = zip(ctx.given, [*initial, *done.totals[0]], strict=True)
        return (None, *(gradient if given else None for given, gradient in pairs))


def _sources(
    step: Step, params: Mapping[str, Tensor] | nn.Module | State, meta: Tree, initial: State
) -> list[Tensor | None]:
    """The user's own tensors, one for each differentiable leaf of the initial state; None where that was made new.

    Raises:
        ValueError: if a tensor that is to have a gradient is not in the initial state.
    """
    if isinstance(params, State):
        return list(floating_leaves(differentiable(params)))
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else dict(params)
    _refuse_computed(step, params, meta, [tensor for tensor in named.values() if tensor.requires_grad])
    for name, tensor in named.items():
        if tensor.requires_grad and name not in initial.params:
            raise ValueError(
                f"parameter {name!r} requires a gradient, but the step's initial state has only "
                f"{', '.join(map(repr, initial.params))}. Let `init` keep the names it is given."
            )
    made_new = len(floating_leaves((initial.optimizer, initial.buffers)))
    return [*(named.get(name) for name in sorted(initial.params)), *[None] * made_new]


def _refuse_computed(
    step: Step, params: Mapping[str, Tensor] | nn.Module | State, meta: Tree, tensors: Sequence[Tensor]
) -> None:
    """Raise if `init` computes the initial state from `tensors`: the gradient on that way would be lost."""
    if isinstance(step, LinearStep) or not tensors:
        return
    with torch.enable_grad():
        state = step.init(params, meta)
    made = [leaf for leaf in floating_leaves(differentiable(state)) if leaf.grad_fn is not None]
    reached = torch.autograd.grad(made, tensors, made, allow_unused=True) if made else ()
    if any(gradient is not None for gradient in reached):
        raise ValueError(
            f"`init` of {type(step).__name__} computes a part of the initial state from parameters that require a "
            "gradient, and the gradient on that way would be lost. Pass a whole mg.State instead of `params`, or "
            "detach what is to be a constant."
        )
