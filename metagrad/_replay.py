"""Training forward, and the same training backward: a plan's actions carried out on states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metagrad._schedule import Action, Drop, Load, Plan, Reverse, Run, Save
from metagrad._store import Store
from metagrad._tree import differentiable, floating_leaves, not_finite
from metagrad._types import Batches, NonFiniteError, Pull, Pullback, State, Step, Tree


class Gradients(NamedTuple):
    """dΦ of the floating-point leaves of the initial state (None unless asked for) and of `meta`."""

    state: list[Tensor] | None
    meta: list[Tensor]


@dataclass
class Replay:
    """One training run that can be walked back once.

    Attributes:
        wrt_params: whether the initial parameters are to have a gradient.
        last_pull: the last step's pullback, made by the forward run where the plan keeps the state it belongs to.
        evaluations: plain step evaluations so far.
        reversals: steps reversed so far.
    """

    step: Step
    batches: Batches
    meta: Tree
    plan: Plan
    store: Store
    wrt_params: bool
    progress: bool
    last_pull: Pull | None = field(default=None, init=False)
    evaluations: int = field(default=0, init=False)
    reversals: int = field(default=0, init=False)

    def forward(self, state: State) -> State:
        """The state after the last step, with what the plan asks for kept in the store."""
        with tqdm(total=self.plan.cost.forward, desc="train", unit="step", disable=not self.progress) as bar:
            for action in self.plan.forward:
                state = self._move(action, state, bar)
        return state

    def reverse(self, state: State, cotangent: Sequence[Tensor]) -> Gradients:
        """Pull `cotangent`, that of the last `state`, back through every step, last to first.

        Raises:
            NonFiniteError: naming the step and the tensors whose cotangent is not finite.
            RuntimeError: at a second call; the kept states are gone.
        """
        if self.reversals > 0:
            raise RuntimeError(
                "this training run was already walked back, and its kept states are gone. Call backward once per "
                "`mg.train` (sum several losses first), or train again."
            )
        total = [torch.zeros_like(leaf) for leaf in floating_leaves(self.meta)]
        carried: list[Tensor] | None = list(cotangent)
        cost = self.plan.cost
        with tqdm(total=cost.replayed + cost.reversed, desc="replay", unit="step", disable=not self.progress) as bar:
            for action in self.plan.reverse:
                if not isinstance(action, Reverse):
                    state = self._move(action, state, bar)
                    continue
                assert carried is not None and state.step == action.step
                pull, self.last_pull = self.last_pull or self._linearize(state)[1], None
                pulled = pull(carried)
                _check_finite(action.step, state, self.meta, pulled)
                carried, total = pulled.state, [a + b for a, b in zip(total, pulled.meta, strict=True)]
                self.reversals += 1
                bar.update()
        return Gradients(carried, total)

    def _move(self, action: Action, state: State, bar: tqdm) -> State:
        match action:
            case Save():
                self.store.put(state)
            case Load(step):
                state = self.store.get(step)
            case Drop(step):
                self.store.drop(step)
            case Run(start, stop):
                for t in range(start, stop):
                    assert state.step == t
                    if t == len(self.batches) - 1:
                        # Under every schedule, since a gradient with a graph may differ from one without in its last
                        # bit; used again where this very step is reversed next.
                        state, pull = self._linearize(state)
                        self.last_pull = pull if self.plan.reverse[0] == Load(t) else None
                    else:
                        # No graph between steps: each step is differentiated by its own pullback.
                        with torch.no_grad():
                            state = self.step(state, self.batches[t], self.meta)
                    self.evaluations += 1
                    bar.update()
        return state

    def _linearize(self, state: State) -> tuple[State, Pull]:
        # Step 0 needs no cotangent of its own state unless the initial parameters are to have a gradient.
        wrt_state = self.wrt_params or state.step > 0
        return self.step.vjp(state, self.batches[state.step], self.meta, wrt_state=wrt_state)


def _check_finite(step: int, state: State, meta: Tree, pulled: Pullback) -> None:
    wrong = not_finite("meta", meta, pulled.meta)
    if pulled.state is not None:
        wrong = not_finite("state", differentiable(state), pulled.state) + wrong
    if wrong:
        raise NonFiniteError(
            f"the cotangent is not finite at step {step} in {', '.join(wrong)}. The run itself is finite; its "
            "derivative is not. With Adam, a larger `eps_root` usually helps: see docs/stability.md."
        )
