"""Steps that users write: `init` and `__call__`, differentiated by plain reverse mode."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metagrad._buffers import DifferentiableStatistics, copies_of, refuse_unseen_changes
from metagrad._random import drawing, seeded
from metagrad._refusals import refuse_changes_in_place, refuse_other_structure, refuse_unknown_leaves, refuse_unreadable
from metagrad._repairs import Repaired
from metagrad._reverse import pull_gradient
from metagrad._tree import (
    describe,
    detached,
    differentiable,
    floating_leaves,
    fresh,
    grouped,
    independent,
    joined,
    with_floating_leaves,
)
from metagrad._types import Batches, LinearStep, Pull, Pullback, State, Step, Tree


@dataclass(frozen=True)
class AutogradStep:
    """A user's step with its pullback, and with the random numbers and the step count taken care of.

    Args:
        step: `init(params, meta)` and `__call__(state, batch, meta)`: see `Step`.
        seed: start of the random numbers that the step may draw, if its `init` says nothing of `rng`.
    """

    step: Step
    seed: int = 0

    def init(self, params: Mapping[str, Tensor] | nn.Module | State, meta: Tree) -> State:
        """The user's initial state, copied; or the one given, counted from step 0.

        Raises:
            ValueError: if the user's `init` returns no `State`, or nothing that can be differentiated.
        """
        variables = fresh(meta)
        with torch.enable_grad():
            state = params if isinstance(params, State) else self.step.init(params, variables)
        if not isinstance(state, State):
            raise ValueError(
                f"`init` of {type(self.step).__name__} returned {describe(state)}. Return mg.State(params), with what "
                "else is carried from step to step under `optimizer`; of a module dict(module.named_parameters())."
            )
        refuse_unknown_leaves(f"the initial state of {type(self.step).__name__}", differentiable(state))
        if not floating_leaves(differentiable(state)):
            raise ValueError(f"the initial state of {type(self.step).__name__} holds no floating-point tensor.")
        made = [leaf for leaf in floating_leaves(differentiable(state)) if leaf.grad_fn is not None]
        leaves = floating_leaves(variables)
        reached = torch.autograd.grad(made, leaves, made, allow_unused=True) if made and leaves else ()
        if any(gradient is not None for gradient in reached):
            raise ValueError(
                f"`init` of {type(self.step).__name__} computes the initial state from `meta`, and the gradient on "
                "that way would be lost. Compute it before, and pass it as `params` to mg.train."
            )
        own: State = independent(state)
        return own._replace(rng=own.rng or seeded(self.seed, own.params), step=0)

    def validate(self, batches: Batches, meta: Tree) -> None:
        """Check what can be known of the batches without the step.

        Raises:
            ValueError: if there is no batch, or they can be read only once.
        """
        refuse_unreadable(batches)

    def __call__(self, state: State, batch: Tree, meta: Tree) -> State:
        """The state after one step; with its graph where gradients are enabled.

        Raises:
            ValueError: if the step returns another kind of state than it was given, or cuts the graph of a gradient.
        """
        if not torch.is_grad_enabled():
            return self.advance(state, batch, meta)[0]
        # Leaves, or views of what has a graph: the step differentiates by each tensor of its state alone, and one of
        # them may have been computed from another.
        parts = differentiable(state)
        leaves = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in floating_leaves(parts)]
        return self._evaluated(state._replace(**with_floating_leaves(parts, leaves)._asdict()), batch, meta)

    def advance(self, state: State, batch: Tree, meta: Tree) -> tuple[State, None]:
        """The next state without a graph, made on the same way as the one with: gradients are on inside."""
        return detached(self._evaluated(state._replace(**fresh(differentiable(state))._asdict()), batch, meta)), None

    def vjp(
        self, state: State, batch: Tree, meta: Tree, *, wrt_state: bool, kept: None = None
    ) -> tuple[Callable[[], State], Pull]:
        """The next state, and the map that pulls its cotangents back through everything the step did.

        Cost: that of one backward through the graph of the step for each cotangent.
        """
        # Fresh leaves: the cotangents will carry everything that comes after this step.
        inputs, meta = fresh(differentiable(state)), fresh(meta)
        new = self._evaluated(state._replace(**inputs._asdict()), batch, meta)
        groups = (floating_leaves(inputs) if wrt_state else [], floating_leaves(meta))

        def pull(cotangents: Sequence[Sequence[Tensor]]) -> list[Pullback]:
            pulled = pull_gradient(floating_leaves(differentiable(new)), joined(groups), cotangents)
            return [Pullback(s if wrt_state else None, m) for s, m in (grouped(each, groups) for each in pulled)]

        return lambda: detached(new), pull

    def read(self, state: State) -> State:
        """`state`: a metric sees it as it is."""
        return state

    def shown(self, part: State, num_metrics: int | None) -> State:
        """`part`: a result has it as it is."""
        return part

    def _evaluated(self, state: State, batch: Tree, meta: Tree) -> State:
        name = type(self.step).__name__
        # Cloned: modules change their buffers in place, and the state is a value.
        copies = copies_of(state.buffers)
        with drawing(state.rng, state.params) as rng, _differentiable_twice():
            with refuse_changes_in_place(name, state=state, batch=batch, meta=meta):
                new = self.step(state._replace(buffers=copies), batch, meta)
        if not isinstance(new, State):
            raise ValueError(f"{name} returned {describe(new)}. Return a state: state._replace(params=...).")
        refuse_other_structure(f"the state after {name}", differentiable(new), differentiable(state))
        refuse_unseen_changes(state.buffers, copies)
        return new._replace(rng=rng[0], step=state.step + 1)


def as_linear(step: Step) -> LinearStep:
    """`step` with its pullback: its own, or that of plain reverse mode."""
    return step if isinstance(step, LinearStep) else AutogradStep(step)


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Gradients on, kernels that can be differentiated twice, and no gradient that forgets its graph."""
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), DifferentiableStatistics(), _WholeGraphs(), Repaired():
        yield


class _WholeGraphs(TorchFunctionMode):
    """Refuses a gradient taken without its graph: the step would be differentiated as if it were a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.backward, torch.autograd.backward):
            raise ValueError(
                "the step calls backward(), which keeps nothing that can be differentiated. Use "
                "torch.autograd.grad(loss, tensors, create_graph=True)."
            )
        if func is torch.autograd.grad and torch.is_grad_enabled() and not kwargs.get("create_graph"):
            raise ValueError(
                "the step calls torch.autograd.grad without create_graph=True, so its gradient would be taken as a "
                "constant. Pass create_graph=True; to take it as a constant on purpose, detach() what it gave."
            )
        return func(*args, **kwargs)
