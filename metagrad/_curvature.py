"""The way back through a gradient in the order of modes that was asked for, or in the fastest that is right."""

import warnings
from dataclasses import dataclass, field

import torch

from metagrad._agreement import reason_of
from metagrad._choice import AUTO, choose
from metagrad._covered import UncoveredError
from metagrad._derivatives import Gradient, ReverseOverReverse, function_at
from metagrad._evaluation import Evaluation, Point
from metagrad._modes import MODES, REFERENCE, Cotangents, Pulled
from metagrad._random import cuda_devices, generator_states, set_generators
from metagrad._types import Params, Scalar, Tree

CURVATURES = (AUTO, *MODES)


@dataclass
class Curvature:
    """Derivatives whose second order is computed in another way than reverse over reverse, where that is safe.

    A step whose loss uses an operation that is not covered is pulled back by reverse over reverse, after a warning.

    Attributes:
        requested: one of `CURVATURES`.
        mode: what was chosen, or proved, at the first pullback of a covered loss; None before.
        said: the reasons given so far for another way than the one requested.
    """

    requested: str
    mode: str | None = None
    said: set[str] = field(default_factory=set)
    plain: ReverseOverReverse = field(default_factory=ReverseOverReverse)

    @property
    def name(self) -> str:
        """What is used where it is safe."""
        return self.mode or REFERENCE

    def gradient(self, evaluate: Evaluation, at: Point) -> Gradient:
        """∇_θ at a point, by reverse mode."""
        return self.plain.gradient(evaluate, at)

    def pull(
        self, evaluate: Evaluation, at: Point, gammas: Cotangents, ends: Cotangents, wrt_params: bool
    ) -> list[Pulled]:
        """In the way chosen; by reverse over reverse where that is cheaper, without the parameters, or safer."""
        devices = cuda_devices(at.params.values())
        rng = generator_states(devices)
        share, inputs = function_at(evaluate, at)

        def loss(params: Params, buffers: Params, meta: Tree) -> tuple[Scalar, Params]:
            set_generators(rng, devices)  # The same random numbers each time it is evaluated.
            return share(params, buffers, meta)

        if wrt_params and self.mode != REFERENCE:
            try:
                if self.mode is None:
                    self.mode = choose(self.requested, loss, inputs).mode
                return MODES[self.mode](loss, inputs, gammas, ends, wrt_params)
            except UncoveredError as error:
                self._say(f"a loss with {error}, whose derivatives in forward mode are not tested")
                if self.requested == AUTO:
                    self.mode = REFERENCE
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._say(f"a loss that it cannot differentiate ({reason_of(error)})")
        return MODES[REFERENCE](loss, inputs, gammas, ends, wrt_params)

    def _say(self, why: str) -> None:
        if why not in self.said:
            self.said.add(why)
            warnings.warn(
                f"curvature={self.requested!r} has no effect on {why}. {REFERENCE} takes its place, as exactly.",
                stacklevel=2,
            )


def derivatives_of(curvature: str) -> Curvature | ReverseOverReverse:
    """The derivatives of that name."""
    return ReverseOverReverse() if curvature == REFERENCE else Curvature(curvature)
