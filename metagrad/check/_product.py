"""One step at one state: its derivative along a change of its inputs, by differences and by its pullback."""

from collections.abc import Sequence
from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from metagrad._tree import differentiable, floating_leaves, grouped, with_floating_leaves
from metagrad._types import LinearStep, NonFiniteError, Scalar, State, Tree
from metagrad.check._runs import dot, normal_like, precision_of, trained, unit
from metagrad.check._slope import slope
from metagrad.check._verdict import Row, row


@dataclass(frozen=True)
class Input:
    """One tensor that the step reads: its name, the block it is reported with, and the direction it is moved in."""

    name: str
    block: str
    direction: Tensor


@dataclass(frozen=True)
class ProductTest:
    """A step at a state, a cotangent v of the next state, and Jᵀv.

    Attributes:
        after: the floating-point leaves of the next state.
        cotangent: v.
        inputs: those of the state, then those of meta.
        gradient: Jᵀv, one for each of `inputs`.
    """

    step: LinearStep
    state: State
    batch: Tree
    meta: Tree
    after: list[Tensor]
    cotangent: list[Tensor]
    inputs: list[Input]
    gradient: list[Tensor]

    @staticmethod
    def of(step: LinearStep, state: State, batch: Tree, meta: Tree, seed: int) -> "ProductTest":
        """The test of `step` at `state`, with random directions and a random cotangent."""
        generator = torch.Generator().manual_seed(seed)
        after = trained(step, state, [batch], meta)
        # In units of each tensor, so that an error in the smallest shows as well as one in the largest.
        cotangent = [normal_like(leaf, generator) / unit(leaf) for leaf in _outputs(after)]
        inputs = [*_state_inputs(state, after, generator), *_meta_inputs(meta, generator)]
        gradient = pulled_back(step, state, batch, meta, cotangent)
        return ProductTest(step, state, batch, meta, _outputs(after), cotangent, inputs, gradient)

    def row(self, name: str, chosen: Sequence[bool], step_size: float, num_levels: int) -> Row:
        """⟨Jᵀv, u⟩ and ⟨v, Ju⟩ for u in the chosen inputs."""
        tangent = [each.direction * float(is_chosen) for each, is_chosen in zip(self.inputs, chosen, strict=True)]

        def along(h: float) -> Scalar:
            # The difference first: products of large, nearly equal numbers would cost digits.
            changes = [new - old for new, old in zip(self._after(tangent, h), self.after, strict=True)]
            product = dot(changes, self.cotangent)
            if not bool(torch.isfinite(product)):
                raise NonFiniteError(
                    f"step {self.state.step} is not finite with {name} moved by {abs(h):.0e} of its size. Pass a "
                    "smaller `step_size`."
                )
            return product

        # Rounding errors have random signs, so they add up like the products' root sum of squares.
        products = [v.double() * leaf.double() for v, leaf in zip(self.cotangent, self.after, strict=True)]
        size = float(dot(products, products).sqrt())
        precision = precision_of((self.state.params, self.meta))
        found = slope(along, torch.zeros((), dtype=torch.float64), step_size, num_levels, precision * size)
        return row(name, float(dot(self.gradient, tangent)), found, size, precision)

    def _after(self, tangent: list[Tensor], distance: float) -> list[Tensor]:
        """The next state's leaves with the inputs moved along `tangent`."""
        variables = differentiable(self.state)
        groups = floating_leaves(variables), floating_leaves(self.meta)
        moved = [x.detach() + distance * u for x, u in zip([*groups[0], *groups[1]], tangent, strict=True)]
        state, meta = grouped(moved, groups)
        start = self.state._replace(**with_floating_leaves(variables, state)._asdict())
        return _outputs(trained(self.step, start, [self.batch], with_floating_leaves(self.meta, meta)))


def pulled_back(step: LinearStep, state: State, batch: Tree, meta: Tree, cotangent: Sequence[Tensor]) -> list[Tensor]:
    """Jᵀv: cotangents of the state, then of meta, by the step's own pullback."""
    _, pull = step.vjp(state, batch, meta, wrt_state=True)
    (pulled,) = pull([[leaf.clone() for leaf in cotangent]])
    assert pulled.state is not None
    return [*pulled.state, *pulled.meta]


def _outputs(state: State) -> list[Tensor]:
    return floating_leaves(differentiable(state))


def _state_inputs(state: State, after: State, generator: torch.Generator) -> list[Input]:
    inputs = []
    for field, now, then in zip(
        differentiable(state)._fields, differentiable(state), differentiable(after), strict=True
    ):
        block = f"state.{field}"
        for name, leaf, later in zip(_names(block, now), floating_leaves(now), floating_leaves(then), strict=True):
            scale = unit(leaf if leaf.any() else later)
            if field != "params" and bool((leaf >= 0).all()) and bool((later >= 0).all()):
                # A running square must stay one: every entry is moved in proportion to itself.
                scale = (leaf if leaf.any() else later).detach()
            inputs.append(Input(name, block, normal_like(leaf, generator) * scale))
    return inputs


def _meta_inputs(meta: Tree, generator: torch.Generator) -> list[Input]:
    named = zip(_names("meta", meta), floating_leaves(meta), strict=True)
    return [Input(name, name, normal_like(leaf, generator) * unit(leaf)) for name, leaf in named]


def _names(root: str, tree: Tree) -> list[str]:
    """Where each of `floating_leaves(tree)` is."""
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return [
        accessor.codify(root)
        for accessor, leaf in zip(accessors, leaves, strict=True)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
