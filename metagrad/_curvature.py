"""The way back through a gradient in the order of modes that was asked for, or in the fastest that is right."""

from dataclasses import dataclass, field

from metagrad._choice import AUTO, Choice, choose
from metagrad._derivatives import Cotangents, Gradient, Pulled, ReverseOverReverse
from metagrad._evaluation import Evaluation, Point
from metagrad._modes import MODES, REFERENCE, Inputs
from metagrad._random import cuda_devices, generator_states, set_generators
from metagrad._types import Params, Scalar, Tree

CURVATURES = (AUTO, *MODES)


@dataclass
class Curvature:
    """Derivatives whose second order is computed in another way than reverse over reverse.

    Attributes:
        requested: one of `CURVATURES`.
        choices: what was found right at the first pullback, by whether the parameters had a cotangent.
    """

    requested: str
    choices: dict[bool, Choice] = field(default_factory=dict)
    plain: ReverseOverReverse = field(default_factory=ReverseOverReverse)

    @property
    def name(self) -> str:
        """What is used."""
        chosen = self.choices.get(True) or self.choices.get(False)
        return self.requested if chosen is None else chosen.mode

    def gradient(self, evaluate: Evaluation, at: Point) -> Gradient:
        """∇_θ at a point, by reverse mode."""
        return self.plain.gradient(evaluate, at)

    def pull(
        self, evaluate: Evaluation, at: Point, gammas: Cotangents, ends: Cotangents, wrt_params: bool
    ) -> list[Pulled]:
        """In the way chosen; the first time that is chosen, or proved."""
        devices = cuda_devices(at.params.values())
        rng = generator_states(devices)

        def loss(params: Params, buffers: Params, meta: Tree) -> tuple[Scalar, Params]:
            set_generators(rng, devices)  # The same random numbers each time it is evaluated.
            share, _, after = evaluate(Point(params, buffers, at.batch, meta))
            return share, after

        given = loss, Inputs(at.params, at.buffers, at.meta), gammas, ends, wrt_params
        # What is right with the parameters' cotangent is so without.
        choice = self.choices.get(wrt_params) or self.choices.get(True)
        if choice is None:
            self.choices[wrt_params], found = choose(self.requested, *given)
        else:
            found = MODES[choice.mode](*given)
        return [Pulled(*each) for each in found]


def derivatives_of(curvature: str) -> "Curvature | ReverseOverReverse":
    """The derivatives of that name."""
    return ReverseOverReverse() if curvature == REFERENCE else Curvature(curvature)
