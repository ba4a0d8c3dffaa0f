"""The way back through a gradient in the order of modes that was asked for, or in the fastest that is right."""

from contextlib import suppress
from dataclasses import dataclass, field

from metagrad._choice import AUTO, Choice, choose
from metagrad._derivatives import Gradient, ReverseOverReverse, function_at
from metagrad._evaluation import Evaluation, Point
from metagrad._modes import MODES, REFERENCE, Cotangents, Pulled
from metagrad._random import cuda_devices, generator_states, set_generators
from metagrad._refusals import graph_of
from metagrad._types import Params, Scalar, Tree

CURVATURES = (AUTO, *MODES)


@dataclass
class Curvature:
    """Derivatives whose second order is computed in another way than reverse over reverse.

    Attributes:
        requested: one of `CURVATURES`.
        choices: what was found right, by whether the parameters had a cotangent.
        proved: the operations on whose derivatives it was.
    """

    requested: str
    choices: dict[bool, Choice] = field(default_factory=dict)
    proved: set[str] = field(default_factory=set)
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
        """In the way chosen; the first time that is chosen, or proved, and again where the loss has a new operation."""
        devices = cuda_devices(at.params.values())
        rng = generator_states(devices)
        share, inputs = function_at(evaluate, at)
        met: set[str] = set()

        def loss(params: Params, buffers: Params, meta: Tree) -> tuple[Scalar, Params]:
            set_generators(rng, devices)  # The same random numbers each time it is evaluated.
            value, after = share(params, buffers, meta)
            met.update(node.name() for node in graph_of([value]))
            return value, after

        given = loss, inputs, gammas, ends, wrt_params
        # What is right with the parameters' cotangent is so without.
        choice = self.choices.get(wrt_params) or self.choices.get(True)
        if choice is not None:
            with suppress(RuntimeError):  # A new operation may have no formula in this mode.
                found = MODES[choice.mode](*given)
                if choice.mode == REFERENCE or met <= self.proved:
                    return found
        self.choices[wrt_params], found = choose(self.requested, *given)
        self.proved |= met
        return found


def derivatives_of(curvature: str) -> Curvature | ReverseOverReverse:
    """The derivatives of that name."""
    return ReverseOverReverse() if curvature == REFERENCE else Curvature(curvature)
