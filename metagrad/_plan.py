"""What a schedule says: actions on states, one after another, and what they cost. Integers only."""

from typing import NamedTuple, TypeAlias


class Save(NamedTuple):
    """Keep the state in hand, which is `state_step`: on disk, or where the store likes."""

    step: int
    on_disk: bool = False


class Load(NamedTuple):
    """Take the kept `state_step` in hand."""

    step: int


class Run(NamedTuple):
    """Run steps start … stop − 1 on the state in hand."""

    start: int
    stop: int


class Reverse(NamedTuple):
    """Pull the cotangent back through `step`; the state in hand is `state_step`."""

    step: int


class Drop(NamedTuple):
    """Forget the kept `state_step`."""

    step: int


Action: TypeAlias = Save | Load | Run | Reverse | Drop


class Cost(NamedTuple):
    """Step evaluations of a plan, and the most states it keeps at a time: all, and those that it wants on disk."""

    forward: int
    replayed: int
    reversed: int
    states: int
    on_disk: int = 0


class Plan(NamedTuple):
    """What to do before the last metric is known, and after.

    Attributes:
        kept: states that are there at the start.
        num_graphs: steps at the end of the run that are always run with their graphs.
    """

    forward: list[Action]
    reverse: list[Action]
    kept: int = 0
    num_graphs: int = 1

    @property
    def cost(self) -> Cost:
        """Evaluations and kept states, counted action by action."""
        kept = peak = self.kept
        on_disk: set[int] = set()
        peak_on_disk = 0
        for action in [*self.forward, *self.reverse]:
            kept += isinstance(action, Save) - isinstance(action, Drop)
            peak = max(peak, kept)
            if isinstance(action, Save) and action.on_disk:
                on_disk.add(action.step)
            if isinstance(action, Drop):
                on_disk.discard(action.step)
            peak_on_disk = max(peak_on_disk, len(on_disk))
        reversals = sum(isinstance(action, Reverse) for action in self.reverse)
        return Cost(_steps_run(self.forward), _steps_run(self.reverse), reversals, peak, peak_on_disk)


def _steps_run(actions: list[Action]) -> int:
    return sum(action.stop - action.start for action in actions if isinstance(action, Run))
