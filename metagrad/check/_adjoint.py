"""The dot-product test of one step: ⟨v, Ju⟩ by differences of the step against ⟨Jᵀv, u⟩ by its pullback."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from metagrad._types import Batches, State, Step, Tree
from metagrad.check._differences import refuse_step_settings
from metagrad.check._product import ProductTest
from metagrad.check._runs import begin, trained
from metagrad.check._verdict import Row, Verdict, overall, table


class StepAdjoint(NamedTuple):
    """The dot-product test of one step.

    Attributes:
        step: which step of the run.
        rows: ⟨Jᵀv, u⟩ by the pullback and ⟨v, Ju⟩ by differences, for u in one block of the step's inputs at a time.
        tensors: the same for each tensor of the blocks that disagree.
    """

    step: int
    rows: list[Row]
    tensors: list[Row]

    @property
    def verdict(self) -> Verdict:
        """ "disagree" if one block does, "agree" if one does and none disagrees, otherwise "cannot tell"."""
        return overall(self.rows)

    @property
    def culprits(self) -> list[str]:
        """The inputs whose derivative is wrong, as precisely as the test can say."""
        wrong = [found.name for found in self.tensors if found.verdict == "disagree"]
        return wrong or [found.name for found in self.rows if found.verdict == "disagree"]

    def __str__(self) -> str:
        meaning = {
            "agree": f"the pullback of step {self.step} is the adjoint of its derivative.",
            "disagree": f"the derivative of step {self.step} with respect to {', '.join(self.culprits)} is wrong. Look "
            "for a detach, .data, .item(), torch.no_grad or a custom backward on the way from there, or a kink "
            "(relu, max, clipping) within `step_size`.",
            "cannot tell": "the error bars are too wide. Run this check in float64 or with another `step_size`.",
        }[self.verdict]
        lines = table("input", "pullback", [*self.rows, *self.tensors])
        return f"{lines}\nVerdict: {self.verdict}: {meaning}"


def step_adjoint(
    step: Step,
    params: Mapping[str, Tensor] | nn.Module | State,
    batches: Batches,
    meta: Tree,
    *,
    at: int = 0,
    step_size: float = 1e-2,
    num_levels: int = 6,
    seed: int = 0,
) -> StepAdjoint:
    """Check the pullback of one step against the step itself, for any step, also one written by hand.

        ⟨v, Ju⟩ = ⟨Jᵀv, u⟩   for a random change u of the inputs and a random cotangent v of the next state

    The left side is a finite difference of the step, extrapolated to step size 0 [ridders1982], and uses no autograd.
    The right side is what `metagradient` would use: the step's `vjp`, or autograd where it has none. u is taken in one
    block of the inputs at a time: parameters, optimizer state, each metaparameter. In a block that disagrees each
    tensor is then tested on its own.

    Args:
        step, params, batches, meta: as for `metagradient`.
        at: which step of the run; the run goes forward to it.
        step_size: the largest change, in units of each tensor's root mean square. Optimizer states and buffers that are
            nowhere negative are moved in proportion to every entry, so that a running square stays one; a zero
            state has the units of the next one.
        num_levels: how many step sizes, each half of the one before.
        seed: of u and v.

    Returns:
        Both products and the error bar for each block, the verdict, and the `culprits`.

    Raises:
        ValueError: for a step outside the run, settings out of range, and as `metagradient` does before training.
        NonFiniteError: if the step of a moved input is not finite.

    Cost: `at` + 1 step evaluations, one pullback, and 2 · num_levels step evaluations for each block (each tensor of a
        block that disagrees). Use float64.

    Example:
        >>> import torch, metagrad as mg
        >>> step = mg.TrainStep(lambda p, b, meta: (p["w"] - b) ** 2 * meta["scale"].detach(), mg.optim.sgd(lr=0.1))
        >>> start, batch = {"w": torch.zeros((), dtype=torch.float64)}, torch.ones(1, dtype=torch.float64)
        >>> mg.check.step_adjoint(step, start, [batch], {"scale": torch.ones((), dtype=torch.float64)}).culprits
        ["meta['scale']"]
    """
    refuse_step_settings(step_size, num_levels)
    running, initial = begin(step, params, batches, meta)
    if not 0 <= at < len(batches):
        raise ValueError(f"`at` is {at}, but the run has steps 0 to {len(batches) - 1}.")
    state, batch = trained(running, initial, batches, meta, at), batches[at]
    test = ProductTest.of(running, state, batch, meta, seed)
    blocks = list(dict.fromkeys(each.block for each in test.inputs))
    rows = [test.row(block, [each.block == block for each in test.inputs], step_size, num_levels) for block in blocks]
    wrong = {found.name for found in rows if found.verdict == "disagree"}
    tensors = [
        test.row(each.name, [other is each for other in test.inputs], step_size, num_levels)
        for each in test.inputs
        if each.block in wrong and each.name != each.block
    ]
    return StepAdjoint(at, rows, tensors)
