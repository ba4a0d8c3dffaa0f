"""The formulas of SGD and Adam for one entry, and their pullbacks; x̄ is the cotangent of x."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metagrad._elementwise import Block, Entries, Pulled, Values
from metagrad._transformation import is_zero


@dataclass(frozen=True)
class SgdRule:
    """g ← g + decay·θ;  v ← kept·v + share·g;  u = −lr·(v, or g + kept·v with Nesterov's look ahead, or g alone)."""

    nesterov: bool

    def update(self, now: Values, count: int, block: Block) -> tuple[Entries, list[Entries]]:
        gradient = _plus(block.gradient, block.params, now["weight_decay"])
        if not block.memory:
            return -now["lr"] * gradient, []
        # A Python number, not torch.where: a where of two Python numbers is float32 whatever the parameters are.
        velocity = now["momentum"] * block.memory[0] + _share(now, count) * gradient
        direction = gradient + now["momentum"] * velocity if self.nesterov else velocity
        return -now["lr"] * direction, [velocity]

    def pull(
        self, now: Values, count: int, block: Block, update: Entries, memory: list[Entries], wanted: bool
    ) -> Pulled:
        gradient = direction = _plus(block.gradient, block.params, now["weight_decay"])
        to_gradient = to_direction = -now["lr"] * update
        back: list[Entries] = []
        values: dict[str, Tensor] = {}
        if block.memory:
            kept, share, before = now["momentum"], _share(now, count), block.memory[0]
            velocity = kept * before + share * gradient
            direction = gradient + kept * velocity if self.nesterov else velocity
            to_velocity = memory[0] + (kept * to_direction if self.nesterov else to_direction)
            to_gradient = share * to_velocity + (to_direction if self.nesterov else 0.0)
            back = [kept * to_velocity]
            if wanted:
                ahead = _dot(to_direction, velocity) if self.nesterov else 0.0
                values["momentum"] = _dot(to_velocity, before) + ahead
                values["dampening"] = -_dot(to_velocity, gradient) if count > 0 else torch.zeros(())
        if wanted:
            values |= {"lr": -_dot(update, direction), "weight_decay": _dot(to_gradient, block.params)}
        to_params = None if is_zero(now["weight_decay"]) else now["weight_decay"] * to_gradient
        return Pulled(to_gradient, to_params, back, values)


@dataclass(frozen=True)
class AdamRule:
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  u = −lr·(m/c₁)/(√(v/c₂ + eps_root) + eps), cₖ = 1 − βₖᵗ.

    The decay is added to u (`decoupled`) or to g.
    """

    decoupled: bool

    def update(self, now: Values, count: int, block: Block) -> tuple[Entries, list[Entries]]:
        gradient = block.gradient if self.decoupled else _plus(block.gradient, block.params, now["weight_decay"])
        beta1, beta2, step = now["betas[0]"], now["betas[1]"], count + 1
        mean = beta1 * block.memory[0] + (1 - beta1) * gradient
        square = beta2 * block.memory[1] + (1 - beta2) * gradient * gradient
        root = (square / (1 - beta2**step) + now["eps_root"]).sqrt()
        direction = (mean / (1 - beta1**step)) / (root + now["eps"])
        if self.decoupled:
            direction = _plus(direction, block.params, now["weight_decay"])
        return -now["lr"] * direction, [mean, square]

    def pull(
        self, now: Values, count: int, block: Block, update: Entries, memory: list[Entries], wanted: bool
    ) -> Pulled:
        decay, beta1, beta2, step = now["weight_decay"], now["betas[0]"], now["betas[1]"], count + 1
        gradient = block.gradient if self.decoupled else _plus(block.gradient, block.params, decay)
        scale1, scale2 = 1 - beta1**step, 1 - beta2**step
        mean = beta1 * block.memory[0] + (1 - beta1) * gradient
        square = beta2 * block.memory[1] + (1 - beta2) * gradient * gradient
        root = (square / scale2 + now["eps_root"]).sqrt()
        divisor = root + now["eps"]
        direction = mean / divisor / scale1

        to_direction = -now["lr"] * update
        to_mean = memory[0] + to_direction / divisor / scale1
        to_divisor = -(to_direction / divisor) * direction
        to_inside = to_divisor / root / 2
        to_square = memory[1] + to_inside / scale2
        to_gradient = (1 - beta1) * to_mean + (2 * (1 - beta2)) * gradient * to_square

        to_params = None
        if not is_zero(decay):
            to_params = decay * (to_direction if self.decoupled else to_gradient)
        values: dict[str, Tensor] = {}
        if wanted:
            decayed = _plus(direction, block.params, decay) if self.decoupled else direction
            values = {
                "lr": -_dot(update, decayed),
                "betas[0]": _dot(to_mean, block.memory[0] - gradient)
                + _dot(to_direction, direction) / scale1 * step * beta1 ** (step - 1),
                "betas[1]": _dot(to_square, block.memory[1] - gradient * gradient)
                + _dot(to_inside, square) / scale2**2 * step * beta2 ** (step - 1),
                "eps": to_divisor.sum(),
                "eps_root": to_inside.sum(),
                "weight_decay": _dot(to_direction if self.decoupled else to_gradient, block.params),
            }
        back = [beta1 * to_mean, beta2 * to_square]
        return Pulled(to_gradient, to_params, back, values)


def _share(now: Values, count: int) -> Tensor | float:
    return 1.0 if count == 0 else 1.0 - now["dampening"]


def _plus(entries: Entries, params: Entries, weight_decay: Tensor | float) -> Entries:
    return entries if is_zero(weight_decay) else entries + weight_decay * params


def _dot(left: Entries, right: Entries) -> Tensor:
    return (left * right).sum()
