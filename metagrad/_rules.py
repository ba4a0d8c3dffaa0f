"""How SGD and Adam make a direction of a gradient, entry by entry, and the pullbacks; x̄ is the cotangent of x."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metagrad._block import Block, Entries, Out, Shares, Values, Wanted
from metagrad._fused import dot, mixed, plus, plus_product, plus_quotient


@dataclass(frozen=True)
class SgdRule:
    """v ← kept·v + share·g;  d = v, or g + kept·v with Nesterov's look ahead, or g alone."""

    nesterov: bool
    decays: bool
    decoupled = False

    def at(self, now: Values, count: int) -> Values:
        # A Python number, not torch.where: a where of two Python numbers is float32 whatever the parameters are.
        return {**now, "share": 1.0 if count == 0 else 1.0 - now["dampening"]}

    def direction(self, now: Values, gradient: Entries, memory: list[Entries], out: Out) -> list[Entries]:
        if not memory:
            return [gradient]
        kept = torch.mul(memory[0], now["momentum"], out=out[0])
        velocity = plus(kept, now["share"], gradient, out=out[0])
        return [plus(gradient, now["momentum"], velocity) if self.nesterov else velocity, velocity]

    def pull(self, now: Values, block: Block, ends: list[Entries], out: Entries, wanted: Wanted) -> Shares:
        if not block.memory:
            out.copy_(ends[0])
            return {}
        kept, share, (before,), (to_direction, to_velocity) = now["momentum"], now["share"], block.memory, ends
        plus(to_velocity, kept if self.nesterov else 1.0, to_direction, out=to_velocity)
        torch.mul(to_velocity, share, out=out)
        if self.nesterov:
            out.add_(to_direction)
        shares: Shares = {}
        if wanted.values:
            shares = {"momentum": dot(to_velocity, before), "share": dot(to_velocity, block.gradient)}
            if self.nesterov:
                velocity = self.direction(now, block.gradient, block.memory, [None])[1]
                shares["momentum"] += dot(to_direction, velocity)
        to_velocity.mul_(kept)
        return shares


@dataclass(frozen=True)
class AdamRule:
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  d = m/(√(scale·v + inside) + outside).

    That is (m/c₁)/(√(v/c₂ + eps_root) + eps) with cₖ = 1 − βₖᵗ, multiplied by c₁ above and below.
    """

    decoupled: bool
    decays: bool

    def at(self, now: Values, count: int) -> Values:
        first, second = (1 - now[name] ** (count + 1) for name in ("betas[0]", "betas[1]"))
        square = first * first
        return {
            **now,
            "scale": square / second,
            "inside": square * now["eps_root"],
            "outside": first * now["eps"],
        }

    def direction(self, now: Values, gradient: Entries, memory: list[Entries], out: Out) -> list[Entries]:
        mean, square = self._means(now, gradient, memory, out)
        return [mean / (self._root(now, square) + now["outside"]), mean, square]

    def pull(self, now: Values, block: Block, ends: list[Entries], out: Entries, wanted: Wanted) -> Shares:
        mean, square = self._means(now, block.gradient, block.memory, [None, None])
        root = self._root(now, square)
        divisor = root + now["outside"]
        to_direction, to_mean, to_square = ends
        quotient = to_direction.div_(divisor)
        to_mean.add_(quotient)
        # −d̄·d is the divisor's cotangent times the divisor, and half of that over the root is the sum's below the root.
        product = quotient.mul_(mean)
        divided = divisor.mul_(root)
        plus_quotient(to_square, -0.5 * now["scale"], product, divided, out=to_square)
        torch.mul(to_mean, 1 - now["betas[0]"], out=out)
        plus_product(out, 2 * (1 - now["betas[1]"]), block.gradient, to_square, out=out)
        shares: Shares = {}
        if wanted.values:
            to_divisor = -product * root / divided
            to_inside = to_divisor / (2 * root)
            gradient, (mean_before, square_before) = block.gradient, block.memory
            shares = {
                "betas[0]": dot(to_mean, mean_before - gradient),
                "betas[1]": dot(to_square, square_before - gradient * gradient),
                "scale": dot(to_inside, square),
                "inside": to_inside.sum(),
                "outside": to_divisor.sum(),
            }
        to_mean.mul_(now["betas[0]"])
        to_square.mul_(now["betas[1]"])
        return shares

    def _means(self, now: Values, gradient: Entries, memory: list[Entries], out: Out) -> tuple[Entries, Entries]:
        mean = mixed(memory[0], 1 - now["betas[0]"], gradient, out=out[0])
        return mean, mixed(memory[1], 1 - now["betas[1]"], gradient * gradient, out=out[1])

    def _root(self, now: Values, square: Entries) -> Tensor:
        return (square * now["scale"]).add_(now["inside"]).sqrt()
