"""Training forward, and the same training backward: a plan's actions carried out on states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metagrad._plan import Action, Drop, Load, Plan, Reverse, Run, Save
from metagrad._progress import ticking
from metagrad._store import Kept, Store
from metagrad._tree import add, differentiable, floating_leaves, not_finite
from metagrad._types import (
    Batches,
    LinearStep,
    NonFiniteError,
    Pull,
    Pullback,
    ReplayMismatchError,
    Scalar,
    State,
    Term,
    Tree,
)
from metagrad._witness import Witness, digests

Terms = Callable[[State], Sequence[Term | None]]
"""For each of K metrics what it adds at a state, None where nothing."""


class Progress(NamedTuple):
    """How far K metrics were pulled back: everything of the steps from `step` on.

    Attributes:
        values: the part of each Φ from states `step` … T; None before its first term.
        carried: the cotangents of `state_step`, or None where nobody asks for those of the initial state.
        totals: the gradients of `meta` so far.
    """

    step: int
    values: list[Scalar | None]
    carried: list[list[Tensor]] | None
    totals: list[list[Tensor]]


class Journal(Protocol):
    """Told of every step, so that a run that is cut off can go on."""

    def stepped(self, state: State) -> None:
        """The forward run reached `state`."""
        ...

    def reversed(self, progress: Progress) -> None:
        """The reverse pass came to `progress`."""
        ...


@dataclass
class Replay:
    """One training run that can be walked back once.

    Attributes:
        wrt_params: whether the initial state is to have a gradient.
        witness: sees every state; None where no step is run twice.
        pulls: pullbacks of the last steps, made by the forward run, of those that are reversed without being run again.
        evaluations: plain step evaluations so far.
        reversals: steps reversed so far.
        unsaved: a state that is to be kept once its step has been evaluated, with what that found worth keeping.
        extra: what was kept with the state in hand, when it was loaded.
        batches_seen: the digest of each batch at its first reading.
    """

    step: LinearStep
    batches: Batches
    meta: Tree
    plan: Plan
    store: Store
    wrt_params: bool
    progress: bool
    witness: Witness | None
    journal: Journal | None = None
    pulls: dict[int, Pull] = field(default_factory=dict, init=False)
    evaluations: int = field(default=0, init=False)
    reversals: int = field(default=0, init=False)
    unsaved: State | None = field(default=None, init=False)
    extra: Tree = field(default=None, init=False)
    batches_seen: dict[int, Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def reversed_at_once(self) -> set[int]:
        """The steps that are reversed before any other is run again: their graphs may be kept until then."""
        steps = takewhile(lambda action: not isinstance(action, Run), self.plan.reverse)
        return {action.step for action in steps if isinstance(action, Reverse)}

    def forward(self, state: State) -> State:
        """The state after the last step, with what the plan asks for kept in the store."""
        if self.witness is not None:
            self.witness.see(state)
        with ticking("train", "step", self.plan.cost.forward, self.progress) as tick:
            for action in self.plan.forward:
                state = self._move(action, state, tick)
        return state

    def reverse(self, state: State, terms: Terms, begun: Progress | None = None) -> Progress:
        """Pull the cotangents of K metrics back through every step, last to first.

        Args:
            state: the last one.
            terms: of the K metrics at a state; asked for once at every state, last to first.
            begun: how far an earlier process came.

        Raises:
            NonFiniteError: naming the step and the tensors whose cotangent is not finite.
            RuntimeError: at a second call; the kept states are gone.
        """
        if self.reversals > 0:
            raise RuntimeError(
                "this training run was already walked back, and its kept states are gone. Call backward once per "
                "`mg.train` (sum several losses first), or train again."
            )
        done = begun or self._nothing_yet(state, terms(state))
        cost, actions = self.plan.cost, self.plan.reverse
        with ticking("replay", "step", cost.replayed + cost.reversed, self.progress) as tick:
            for number, action in enumerate(actions):
                if not isinstance(action, Reverse):
                    state = self._move(action, state, tick)
                    continue
                assert state.step == action.step == done.step - 1
                following = next((a for a in actions[number + 1 :] if not isinstance(a, Drop)), None)
                if isinstance(following, Load):
                    self.store.expect(following.step)
                done = self._pulled(state, done, terms)
                self.reversals += 1
                tick()
                if self.journal is not None:
                    self.journal.reversed(done)
        return done

    def _pulled(self, state: State, done: Progress, terms: Terms) -> Progress:
        """One step further back: through the step that `state` is before, and with the metrics' terms at `state`."""
        assert done.carried is not None
        pull = self.pulls.pop(state.step, None) or self._linearize(state)[1]
        pulled = pull(done.carried)
        for each in pulled:
            check_finite(state, self.meta, each)
        totals = [add(total, each.meta) for total, each in zip(done.totals, pulled, strict=True)]
        carried = None if pulled[0].state is None else [each.state or [] for each in pulled]
        return _with_terms(Progress(state.step, done.values, carried, totals), terms(state))

    def _nothing_yet(self, state: State, terms: Sequence[Term | None]) -> Progress:
        leaves = floating_leaves(differentiable(state))
        # Copied: each metric's own, for a pullback to a state uses up what it is given.
        used_up = state.step > 1 or self.wrt_params
        carried = [
            [x.clone() if used_up else x for x in t.cotangent] if t else [torch.zeros_like(x) for x in leaves]
            for t in terms
        ]
        totals = [[torch.zeros_like(leaf) for leaf in floating_leaves(self.meta)] for _ in terms]
        return Progress(state.step, [t.value if t else None for t in terms], carried, totals)

    def _move(self, action: Action, state: State, tick: Callable[[], object]) -> State:
        if self.unsaved is not None and not isinstance(action, Run):
            self._save(None)
        match action:
            case Save():
                self.unsaved = state
            case Load(step):
                state, self.extra = self.store.get(step)
            case Drop(step):
                self.store.drop(step)
            case Run(start, stop):
                assert state.step == start
                for _ in range(start, stop):
                    state = self._advance(state)
                    tick()
        return state

    def _advance(self, state: State) -> State:
        """One step forward; a state to be saved is saved with what this, its own step, finds worth keeping."""
        if state.step >= len(self.batches) - self.plan.num_graphs:
            # The last one under every schedule, since a gradient with a graph may differ from one without in its last
            # bit; used again where this very step is reversed before another is run.
            after, pull = self._linearize(state)
            new, extra = after(), None
            if state.step in self.reversed_at_once:
                self.pulls[state.step] = pull
        else:
            # No graph between steps: each step is differentiated by its own pullback.
            with torch.no_grad():
                new, extra = self.step.advance(state, self._batch(state.step), self.meta)
        if self.unsaved is not None:
            self._save(extra)
        if self.witness is not None:
            self.witness.see(new)
        self.evaluations += 1
        self.extra = None
        if self.journal is not None:
            self.journal.stepped(new)
        return new

    def _save(self, extra: Tree) -> None:
        assert self.unsaved is not None
        self.store.put(Kept(self.unsaved, extra))
        self.unsaved = None

    def _linearize(self, state: State) -> tuple[Callable[[], State], Pull]:
        # Step 0 needs no cotangent of its own state unless the initial parameters are to have a gradient.
        wrt_state = self.wrt_params or state.step > 0
        return self.step.vjp(state, self._batch(state.step), self.meta, wrt_state=wrt_state, kept=self.extra)

    def _batch(self, step: int) -> Tree:
        """The batch of a step, which must be the same at every reading."""
        batch = self.batches[step]
        new = digests(batch)
        if not torch.equal(self.batches_seen.setdefault(step, new), new):
            raise ReplayMismatchError(
                f"the batch of step {step} is another than when it was read first. Draw batches once, before training, "
                "for instance list(loader)."
            )
        return batch


def _with_terms(progress: Progress, terms: Sequence[Term | None]) -> Progress:
    """`progress` with what each metric adds at its state."""
    values, carried = list(progress.values), None if progress.carried is None else list(progress.carried)
    for k, term in enumerate(terms):
        if term is not None:
            before = values[k]
            values[k] = term.value if before is None else before + term.value
            if carried is not None:
                carried[k] = add(carried[k], term.cotangent)
    return progress._replace(values=values, carried=carried)


def check_finite(state: State, meta: Tree, pulled: Pullback) -> None:
    """Raise for a cotangent with a NaN or an infinity, naming the step and the tensors."""
    wrong = not_finite("meta", meta, pulled.meta)
    if pulled.state is not None:
        wrong = not_finite("state", differentiable(state), pulled.state) + wrong
    if wrong:
        raise NonFiniteError(
            f"the cotangent is not finite at step {state.step} in {', '.join(wrong)}. The run itself is finite; its "
            "derivative is not. With Adam, a larger `eps_root` usually helps: see docs/stability.md."
        )
